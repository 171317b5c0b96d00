"""One other engine in a process of its own: starts its program, sends requests, reads answers. See `peers/`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NamedTuple

from ..engine.errors import BadInput, MissingExtra, StockadeError

FOLDER = Path(__file__).parent / "peers"
PROGRAMS = {
    "stockade": "with_stockade.py",
    "transformers": "with_transformers.py",
    "llama.cpp": "with_llama_cpp.py",
    "openvino": "with_openvino.py",
    "vllm": "with_vllm.py",
    "url": "with_url.py",
}
PACKAGES = {"llama.cpp": "xllamacpp", "openvino": "openvino-genai"}
READS_GGUF = ("llama.cpp", "openvino")
_SECONDS = 900.0  # that a request may take


class UnknownPeer(BadInput):
    """There is no program for an engine of this name."""


class PeerFailed(StockadeError):
    """Another engine's process has ended, was silent for too long, or answered with an error."""


class PeerSpec(NamedTuple):
    """python: the interpreter of its environment. url: of a server."""

    name: str
    python: str = sys.executable
    url: str | None = None

    @classmethod
    def parse(cls, text: str) -> PeerSpec:
        """Of `NAME`, `NAME=PYTHON` or `url=http://…`. Raises `UnknownPeer`, and `BadInput` for a URL or an
        interpreter that is none."""
        name, _, value = text.partition("=")
        if name not in PROGRAMS:
            raise UnknownPeer(f"no peer {name!r}; there are {', '.join(PROGRAMS)} (url=http://… for any server)")
        if name == "url":
            if not value.startswith(("http://", "https://")):
                raise BadInput(f"a peer url is url=http://HOST:PORT, not {text!r}")
            return cls(name, url=value)
        if value and not Path(value).is_file():
            raise BadInput(f"{value} is no Python interpreter; give {name}=/path/to/python")
        return cls(name, value or sys.executable)


class Peer:
    """A started program. Close it, or use it in a `with`. Raises `MissingExtra` where its package is not there."""

    def __init__(self, spec: PeerSpec, threads: int) -> None:
        self.spec = spec
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if spec.name != "stockade":
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [spec.python, str(FOLDER / PROGRAMS[spec.name])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=tempfile.gettempdir(),  # a folder of this checkout would shadow packages
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, seconds: float = _SECONDS, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises `PeerFailed` and `MissingExtra`."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._ended() from None
        with DefaultSelector() as selector:
            selector.register(process.stdout, EVENT_READ)
            if not selector.select(seconds):
                self.close()
                raise PeerFailed(f"{self.spec.name} did not answer within {seconds:g} s")
        line = process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.spec.name}: {answer['error']['type']}: {answer['error']['message']}")
        return dict(answer)

    def close(self) -> None:
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except OSError:  # what was left to write has no reader
                    continue

    def _ended(self) -> StockadeError:
        self._process.wait(10)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        if last.startswith(("ModuleNotFoundError", "ImportError")):
            package = PACKAGES.get(self.spec.name, self.spec.name)
            return MissingExtra(
                f"{self.spec.python} cannot run {self.spec.name} ({last}): install {package} there, or name another "
                f"interpreter: --peer {self.spec.name}=/path/to/python"
            )
        return PeerFailed(f"{self.spec.name} ended with {self._process.returncode}: {last}")
