"""What every peer's program shares: requests come as JSON lines, answers leave as JSON lines. Standard library only.

    {"do": "load", "model": FOLDER, "gguf": FILE, "dtype": "bf16", "threads": 2, "head": {"file": FILE}, "url": URL}
        -> {"name": …, "version": …, "dtype": …, "cannot": {"score": why, …}}
    {"do": "run", "ids": […], "text": "…", "new": 64} -> {"ids": […] or null, "text": …, "times": [seconds, …]}
    {"do": "score", "ids": […], "text": "…"} -> {"score": P(harmless), "seconds": …}

Of `load`, what an engine does not read may be null. Times are seconds from the request. What goes wrong is
{"error": {"type": …, "message": …}}.
"""

import json
import os
import sys


def serve(peer):
    """Answer requests with the methods `load`, `run` and `score` of `peer` until there are no more. Whatever else
    writes to the standard output is sent to the standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(peer, asked.pop("do"))(**asked)
        except Exception as error:
            answer = {"error": {"type": type(error).__name__, "message": str(error)}}
        out.write(json.dumps(answer) + "\n")
        out.flush()
