"""This project's engine as a peer among others: the only one of these programs that imports stockade."""

from time import perf_counter

import torch
from peer_lines import serve

from stockade import __version__
from stockade.engine.engine import Engine
from stockade.engine.passes import Answer, Decision, Score
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted


class Scored:
    """No guard: one pass of the detector over a text."""

    def __init__(self, text):
        self.text = text

    def run(self, chat, traits, release="verdict"):
        scored = yield Score("detector", (Untrusted(self.text),))
        return Decision(Answer(str(scored.score)), Outcome.UNGUARDED)


class Stockade:
    def load(self, model, dtype, threads, head=None, **_):
        torch.set_num_threads(threads)
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        self.engine = Engine(model, None if head is None else head["file"], device="cpu", dtype=kind)
        cannot = {} if head is not None else {"score": "no detector was given"}
        return {"name": "stockade", "version": __version__, "dtype": dtype, "cannot": cannot}

    def run(self, ids, new, **_):
        began, times = perf_counter(), []
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        request = self.engine.submit_prompt(ids, sampling)
        (first,) = request.runs.values()
        while request.reply is None:
            self.engine.step()
            got = first.sequence.num_tokens - first.sequence.prompt_tokens
            times += [perf_counter() - began] * (got - len(times))
        return {"ids": request.reply.token_ids, "text": request.reply.text, "times": times}

    def score(self, text, **_):
        began = perf_counter()
        (reply,) = self.engine.chat(["?"], guard=Scored(text))
        return {"score": float(reply.text), "seconds": perf_counter() - began}


serve(Stockade())
