"""OpenVINO GenAI as a peer, from a GGUF file; its prefix cache is on."""

from time import perf_counter

import numpy
import openvino
import openvino_genai
from peer_lines import serve

CANNOT = {"score": "its pipeline gives tokens, no hidden states: a detector with a head cannot run on it"}


class Times(openvino_genai.StreamerBase):
    def __init__(self):
        super().__init__()
        self.began, self.times = perf_counter(), []

    def write(self, token):
        count = len(token) if isinstance(token, list) else 1
        self.times += [perf_counter() - self.began] * count
        return openvino_genai.StreamingStatus.RUNNING

    def end(self):
        pass


class OpenVino:
    def load(self, gguf, threads, dtype, **_):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 1
        # without a hint it computes in what the processor is fastest with
        hint = {"INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[dtype]}
        threads_of = {"INFERENCE_NUM_THREADS": threads}
        self.pipe = openvino_genai.LLMPipeline(gguf, "CPU", scheduler_config=scheduler, **hint, **threads_of)
        self.tokenizer = self.pipe.get_tokenizer()
        return {"name": "openvino", "version": openvino_genai.__version__, "dtype": dtype, "cannot": CANNOT}

    def run(self, ids, new, **_):
        prompt = numpy.array([ids], dtype=numpy.int64)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        times = Times()
        mask = openvino.Tensor(numpy.ones_like(prompt))
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), mask)
        found = self.pipe.generate(inputs, config, times).tokens[0]
        return {"ids": list(found), "text": self.tokenizer.decode(list(found)), "times": times.times}


serve(OpenVino())
