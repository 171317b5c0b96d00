"""`transformers` as a peer: `generate` with its own cache, which no second request finds again."""

import json
from time import perf_counter

import torch
import transformers
from peer_lines import serve
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class Times:
    """Notes when a token comes; the first call has the prompt."""

    def __init__(self):
        self.began, self.times, self.prompt = perf_counter(), [], True

    def put(self, value):
        if not self.prompt:
            self.times += [perf_counter() - self.began] * value.numel()
        self.prompt = False

    def end(self):
        pass


class Transformers:
    def load(self, model, dtype, threads, head=None, **_):
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=kind).eval()
        self.pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        self.head = None
        cannot = {} if head is not None else {"score": "no detector was given"}
        if head is not None:
            with safe_open(head["file"], "pt") as file:
                spec = json.loads(file.metadata()["spec"])
                self.head = spec["layer"], file.get_tensor("weight"), file.get_tensor("bias")
                if spec["pooling"] != "mean" or spec["norm"]:
                    cannot = {"score": "this program knows heads on an un-normed mean only"}
        return {"name": "transformers", "version": transformers.__version__, "dtype": dtype, "cannot": cannot}

    @torch.inference_mode()
    def run(self, ids, new, **_):
        streamer = Times()
        prompt = torch.tensor([ids])
        config = GenerationConfig(eos_token_id=None, pad_token_id=self.pad, max_new_tokens=new, do_sample=False)
        mask = torch.ones_like(prompt)
        out = self.model.generate(prompt, attention_mask=mask, generation_config=config, streamer=streamer)
        found = out[0, len(ids) :].tolist()
        return {"ids": found, "text": self.tokenizer.decode(found), "times": streamer.times}

    @torch.inference_mode()
    def score(self, text, **_):
        began = perf_counter()
        layer, weight, bias = self.head
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        states = self.model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        logit = states[layer][0].float().mean(0) @ weight.float() + bias.float()[0]
        return {"score": float(torch.sigmoid(logit)), "seconds": perf_counter() - began}


serve(Transformers())
