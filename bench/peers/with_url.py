"""Any server with OpenAI's completions as a peer: vLLM, SGLang, llama-server, another stockade … It streams."""

import json
import urllib.request
from time import perf_counter

from peer_lines import serve

CANNOT = {"score": "the protocol has no hidden states: a detector would be another server"}


class Url:
    def load(self, url, **_):
        self.url = url.rstrip("/").removesuffix("/v1")
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as reply:
            self.model = json.load(reply)["data"][0]["id"]
        return {"name": self.url, "version": self.model, "dtype": "unknown", "cannot": CANNOT}

    def run(self, text, new, **_):
        asked = {"model": self.model, "prompt": text, "max_tokens": new, "temperature": 0, "stream": True}
        body = json.dumps({**asked, "ignore_eos": True}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}, method="POST"
        )
        began, pieces, times = perf_counter(), [], []
        with urllib.request.urlopen(request, timeout=600) as reply:
            for line in reply:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                new_text = "".join(choice.get("text") or "" for choice in event["choices"])
                if new_text:
                    times.append(perf_counter() - began)
                    pieces.append(new_text)
        return {"ids": None, "text": "".join(pieces), "times": times}


serve(Url())
