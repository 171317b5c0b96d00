"""Requests ready to be submitted: questions of given sizes, each with the guard that takes it down its path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, get_args

from ..engine.engine import Engine
from ..engine.errors import BadInput, DoesNotFit, ImagesNotSupported
from ..engine.guards import Guard
from ..engine.passes import ReleaseMode
from ..engine.running import Run
from ..engine.sampling import SamplingParams
from .driving import Ask
from .published import Lengths
from .traffic import Item
from .variants import PATHS, shipped_guards, wanted_outcome
from .workload import picture, question

CAPTION = 64  # tokens


def guard_names() -> tuple[str, ...]:
    return tuple(shipped_guards(Lengths(2, 2, 2, 2), PATHS[0]))


def check_names(guards: Sequence[str], releases: Sequence[str] = ()) -> None:
    """Raises `BadInput` for a guard or a way of release that there is not."""
    for known, names, what in ((guard_names(), guards, "guard"), (get_args(ReleaseMode), releases, "release")):
        for name in names:
            if name not in known:
                raise BadInput(f"no {what} {name!r} to measure; there are {', '.join(known)}")


@dataclass
class Asker:
    """Makes requests for one engine that has `bench_models`. prefix: a text that all of them begin with."""

    engine: Engine
    prefix: str = ""
    _guards: dict[tuple[str, int], dict[str, Guard | None]] = field(default_factory=dict)

    def ask(self, item: Item, guard: str, random: Random) -> Ask:
        """A question that nobody asked before, with pictures of its own; caption and rewrite are forced to their
        lengths as the answer is to its own."""
        text = question(self.engine.models["mllm"].codec.tokenizer, item.prompt_tokens, random)
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture(random)} for _ in range(item.images)]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        if self.prefix:
            messages.insert(0, {"role": "system", "content": self.prefix})
        path = PATHS[item.harmful]
        chosen = self._guard(guard, path, item.answer_tokens)
        return Ask(item, messages, chosen, wanted_outcome(chosen, path))

    def check_fits(self, items: Sequence[Item]) -> None:
        """Raises `DoesNotFit` or `PromptTooLong` for requests too large for the model or the page pool, and
        `ImagesNotSupported` for images that nothing here sees."""
        if any(item.images for item in items) and self.engine.models["mllm"].backbone.vision is None:
            raise ImagesNotSupported("this workload has images and this model no eyes; try smol-llava or tiny-llava")
        largest = max(items, key=lambda item: item.prompt_tokens + item.answer_tokens)
        most_seen = max(items, key=lambda item: (item.images, item.prompt_tokens + item.answer_tokens))
        for item in {largest, most_seen}:
            ask = self.ask(item, "off", Random(0))
            sampling = SamplingParams(max_tokens=item.answer_tokens, ignore_eos=True)
            request = self.engine.submit(ask.messages, sampling=sampling)
            run = request.runs[0]
            self.engine.abort(request.id)
            assert isinstance(run, Run)
            needed = run.sequence.prompt_tokens + item.answer_tokens
            if needed > run.sequence.limit:
                raise DoesNotFit(
                    f"a request of this workload needs {needed:,} tokens ({item.answer_tokens:,} of them for the "
                    f"answer); the model takes {run.sequence.limit:,}"
                )

    def _guard(self, name: str, path: str, answer_tokens: int) -> Guard | None:
        key = path, answer_tokens
        if key not in self._guards:
            self._guards[key] = shipped_guards(Lengths(answer_tokens, 2, CAPTION, answer_tokens), path)
        return self._guards[key][name]
