"""Who writes harmless answers for a detoxifier to learn from: the engine, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.guards import Guard, HarmHead, Refuse
from ..engine.request import FinishReason, Reply
from ..engine.sampling import SamplingParams
from .many import answer_many
from .triples import SORRY

Teacher = Callable[[Sequence[str]], Iterator[tuple[int, str | None]]]
"""Questions in; (the question's number, the answer) out as they are done, None where there is none."""

TRIES = 4
MOST_BYTES = 4 << 20  # of a response


@dataclass(frozen=True)
class EngineTeacher:
    """The engine's own model. Where it has a detector, an answer that this finds harmful becomes the released
    script's fixed one."""

    engine: Engine
    sampling: SamplingParams

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        has_detector = "detector" in self.engine.traits
        guard = Guard(HarmHead(), Refuse(SORRY)) if has_detector else Guard.off()
        for number, reply in answer_many(self.engine, questions, guard, self.sampling):
            # an answer that was cut off teaches to stop in the middle
            whole = isinstance(reply, Reply) and reply.finish_reason in (FinishReason.STOP, FinishReason.REFUSED)
            yield number, reply.text if whole and isinstance(reply, Reply) else None


@dataclass(frozen=True)
class EndpointTeacher:
    """`/chat/completions` under a URL. key: sent as bearer token. concurrent: requests at once. timeout: seconds.

    A busy or failing endpoint is asked `TRIES` times. Raises `BadInput` for one that refuses the key or the model.
    """

    url: str
    model: str
    key: str | None = None
    max_tokens: int = 512
    concurrent: int = 8
    timeout: float = 120.0
    pause: float = 1.0  # seconds before the second try; doubles

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BadInput(f"an endpoint is an http:// or https:// address that ends in /v1, not {self.url!r}")

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        with ThreadPoolExecutor(self.concurrent) as pool:
            tasks = {pool.submit(self._ask, question): number for number, question in enumerate(questions)}
            try:
                for task in as_completed(tasks):
                    yield tasks[task], task.result()
            finally:
                for task in tasks:
                    task.cancel()

    def _ask(self, question: str) -> str | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = self.url.rstrip("/") + "/chat/completions"
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            request = HttpRequest(address, json.dumps(body).encode(), headers)
            try:
                with urlopen(request, timeout=self.timeout) as answer:
                    return _text(json.loads(answer.read(MOST_BYTES)))
            except HTTPError as error:
                if error.code in (401, 403, 404):
                    raise BadInput(f"{address} answers {error.code}: check address, key and model") from None
                if error.code < 500 and error.code != 429:
                    return None
            except (URLError, TimeoutError, ConnectionError, ValueError):
                continue
        return None


def _text(answer: Any) -> str | None:
    """A whole answer's text; None for one that was cut off, refused or is of another form."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) and choice.get("finish_reason") == "stop" else None
