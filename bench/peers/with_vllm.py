"""vLLM as a peer; its prefix cache is on. It may compile for minutes when it loads."""

import os
from time import perf_counter

from peer_lines import serve

CANNOT = {"score": "an engine that generates gives no hidden states: a detector with a head cannot run on it"}
CONTEXT = 4096


class Vllm:
    def load(self, model, threads, dtype, **_):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: its steps are timed
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import torch
        import vllm

        self.vllm = vllm
        self.engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=model,
                dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
                max_model_len=CONTEXT,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        torch.set_num_threads(threads)
        self.asked = 0
        return {"name": "vllm", "version": vllm.__version__, "dtype": dtype, "cannot": CANNOT}

    def run(self, ids, new, **_):
        sampling = self.vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        self.asked += 1
        began, times, found = perf_counter(), [], None
        self.engine.add_request(str(self.asked), {"prompt_token_ids": ids}, sampling)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found = output.outputs[0]
                times += [perf_counter() - began] * (len(found.token_ids) - len(times))
        return {"ids": list(found.token_ids), "text": found.text, "times": times}


serve(Vllm())
