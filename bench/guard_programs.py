"""What passes a request becomes under each guard, in tokens: the programs that a simulated replica runs.

Sizes follow the guards' prompts; which of two paths a request takes is its own affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..engine.errors import BadInput

# Tokens of the guards' prompts beside question, answer and caption, counted with SmolLM2's tokenizer.
JUDGE = 35
JUDGE_AGAIN = 24  # what follows the question: the rest was read for the first verdict
JUDGE_LAST = 27  # as one more turn of the answer's conversation
CAPTION = 14
EYES_CLOSED, WITHOUT_HINTS = 45, 23
REWRITE = 47
INVOCATION = 4  # of an activated adapter, and the answer's last token

GUARDS = ("off", "protector-separate", "protector-adapter", "probe", "ecso", "ecso-continued")
MLLM, DETECTOR, DETOXIFIER = "mllm", "detector", "detoxifier"


@dataclass(frozen=True)
class Asked:
    """A request. arrival: seconds. prompt: tokens of its question. answer: tokens that are decoded for it. harmful:
    whether the guard finds its first answer so; the mended one passes."""

    arrival: float
    prompt: int
    answer: int
    images: int = 0
    harmful: bool = False


@dataclass(frozen=True)
class Sizes:
    """Tokens. image: of one. template: that the chat template adds to a question; shared: those of them that all
    requests begin with, and find in the page pool. caption: decoded for ECSO."""

    image: int = 0
    template: int = 30
    shared: int = 0
    caption: int = 64


class Stage(NamedTuple):
    """One pass. model: whose lane. prompt: tokens to compute before its first token or its score; known: those before
    them that are found in the page pool. new: tokens to decode; 0: it only judges. images: to encode. screen: whether
    the detector reads along; tap: whether a row of its own closes it."""

    label: str
    model: str
    prompt: int
    known: int = 0
    new: int = 0
    images: int = 0
    screen: bool = False
    tap: bool = False


def stages(guard: str, asked: Asked, sizes: Sizes) -> tuple[Stage, ...]:
    """The passes of a request, one after the other, as `bench throughput` measures them: one round of mending, judged
    again. `protector-separate` has a detector and a detoxifier with weights of their own; those of the adapter and of
    the probe are adapters on the model's.

    Left out: what a rewrite's prompt has computed ahead, drafts, refusals. Raises `BadInput` for an unknown guard.
    """
    image = asked.images * sizes.image
    seen = image + sizes.template
    answer = Stage("answer", MLLM, seen - sizes.shared + asked.prompt, sizes.shared, asked.answer, asked.images)
    whole = seen + asked.prompt + asked.answer
    rewrite = Stage("rewrite", DETOXIFIER, asked.prompt + asked.answer + REWRITE, sizes.template, asked.answer)
    if guard == "off":
        return (answer,)
    if guard == "protector-separate":
        first = answer._replace(screen=True)
        return (first, rewrite._replace(screen=True)) if asked.harmful else (first,)
    if guard in ("protector-adapter", "probe"):
        # the adapter's pages of a prompt are not the base's, and what it wrote is read anew
        own = rewrite._replace(model=MLLM, prompt=rewrite.prompt + sizes.template, known=0)
        again = Stage("score", MLLM, asked.answer + INVOCATION)
        mended = (own, again) if asked.harmful else ()
        if guard == "probe":
            return answer._replace(tap=True), *mended
        return answer, Stage("score", MLLM, INVOCATION + 1, whole - 1), *mended
    if guard in ("ecso", "ecso-continued"):
        continued = guard == "ecso-continued"
        judge = Stage("judge", MLLM, JUDGE + asked.prompt + asked.answer, seen)
        if continued:
            judge = Stage("judge", MLLM, JUDGE_LAST, whole - 1)
        if not asked.harmful:
            return answer, judge
        caption = Stage("caption", MLLM, CAPTION + asked.prompt, seen, sizes.caption)
        hints = EYES_CLOSED + sizes.caption if image else WITHOUT_HINTS
        second = Stage("eyes_closed", MLLM, hints + asked.prompt, sizes.template, asked.answer)
        again = Stage("judge", MLLM, JUDGE_AGAIN + asked.answer, sizes.template + asked.prompt)
        if image:  # it was not asked without the image before
            again = Stage("judge", MLLM, JUDGE + asked.prompt + asked.answer, sizes.template)
        if continued:
            again = Stage("judge", MLLM, JUDGE_LAST, second.known + second.prompt + asked.answer - 1)
        return (answer, judge, caption, second, again) if image else (answer, judge, second, again)
    raise BadInput(f"no guard {guard!r} to simulate; there are {', '.join(GUARDS)}")


def models_of(guard: str, harmful: bool) -> set[str]:
    """Whose lanes a guard needs, on the harmless path and where wanted on the harmful one, too."""
    sizes = Sizes()
    found = set()
    for path in (False, True) if harmful else (False,):
        for stage in stages(guard, Asked(0.0, 1, 2, 0, path), sizes):
            found |= {stage.model, DETECTOR} if stage.screen else {stage.model}
    return found
