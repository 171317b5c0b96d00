"""llama.cpp as a peer, through the package `xllamacpp`; a slot's prompt cache is on."""

from time import perf_counter

import xllamacpp
from peer_lines import serve

CANNOT = {"score": "it shows no hidden state of an inner layer: a detector with a head there cannot run on it"}


class LlamaCpp:
    def load(self, gguf, threads, dtype, **_):
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_parallel, params.n_ctx, params.warmup = 1, 4096, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        self.server = xllamacpp.Server(params)
        version = getattr(xllamacpp, "__version__", "")
        return {"name": "llama.cpp", "version": f"xllamacpp {version}", "dtype": dtype, "cannot": CANNOT}

    def run(self, ids, new, **_):
        began, times, text, failed = perf_counter(), [], [], []

        def note(pieces):
            now = perf_counter() - began
            for piece in pieces if isinstance(pieces, list) else [pieces]:
                if "error" in piece:
                    failed.append(str(piece["error"]))
                said = "".join(choice["text"] for choice in piece.get("choices", []))
                if said:
                    times.append(now)
                    text.append(said)
            return False

        asked = {"prompt": ids, "n_predict": new, "temperature": 0, "stream": True, "cache_prompt": True}
        self.server.handle_completions({**asked, "ignore_eos": True}, note)
        if failed:
            raise RuntimeError(failed[0])
        return {"ids": None, "text": "".join(text), "times": times}


serve(LlamaCpp())
