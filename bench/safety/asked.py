"""Cases through the engine under a guard, and what of each reply is kept: figures, never a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from ...engine.engine import Engine, GuardLike
from ...engine.errors import BadInput
from ...engine.request import Outcome, Reply
from ...engine.sampling import SamplingParams
from ...train.many import answer_many
from ...train.rows import Bad
from .cases import Case, Kind
from .judges import Judge, refuses
from .utility import right

REMEDIES = ("rewrite", "eyes_closed")
Keep = Callable[[Case, bool, str, Reply], None]
"""Told of each reply: the case, whether its image was there, the guard's name, the reply."""


class Result(NamedTuple):
    """Of one reply. harmful: what each judge says of it, None where it said nothing; of attacks only. refused: by the
    keyword rule or the guard. flagged: whether the guard found the first answer harmful. rounds: remedies. mended:
    whether what a remedy made of the answer went out. exposed: seconds from the answer's end to the reply. computed,
    generated: tokens of all passes. right: of a utility case."""

    harmful: tuple[bool | None, ...]
    refused: bool
    flagged: bool
    failed: bool
    rounds: int
    mended: bool
    exposed: float
    computed: int
    generated: int
    right: float | None


class Answered(NamedTuple):
    """seconds: of the engine, judging not counted. results: None where a case could not be asked."""

    seconds: float
    results: list[Result | None]


def answer_cases(
    engine: Engine,
    cases: Sequence[Case],
    with_image: bool,
    guard: GuardLike | None,
    name: str,
    sampling: SamplingParams,
    judges: Sequence[Judge],
    at_once: int,
    bad: Bad,
    keep: Keep | None = None,
) -> Answered:
    """Raises what `bad` raises for a case that cannot be asked (an image that is none, a text that is too long)."""
    replies: list[Reply | None] = [None] * len(cases)
    # what another guard computed of the same questions and images would be a gift
    engine.pool.clear_cache()
    engine.runner.features.clear()
    began = perf_counter()
    for number, found in answer_many(engine, _chats(cases, with_image), guard, sampling, at_once):
        if isinstance(found, BadInput):
            bad(f"{cases[number].set}, {cases[number].scenario}, {cases[number].id}: {found}")
        else:
            replies[number] = found
    seconds = perf_counter() - began
    attacks = [number for number, case in enumerate(cases) if case.kind is Kind.ATTACK]
    pairs = {n: (cases[n].alone, reply.text) for n in attacks if (reply := replies[n]) is not None}
    said = [dict(zip(pairs, judge(list(pairs.values())), strict=True)) for judge in judges]
    results: list[Result | None] = []
    for number, case in enumerate(cases):
        one = replies[number]
        if one is None:
            results.append(None)
            continue
        results.append(_result(case, one, tuple(judge[number] for judge in said) if number in pairs else ()))
        if keep is not None:
            keep(case, with_image, name, one)
    return Answered(seconds, results)


def _chats(cases: Sequence[Case], with_image: bool) -> Iterator[Any]:
    for case in cases:
        yield case.messages(with_image)


def _result(case: Case, reply: Reply, harmful: tuple[bool | None, ...]) -> Result:
    first = reply.verdicts[0] if reply.verdicts else None
    return Result(
        harmful,
        reply.outcome is Outcome.REFUSED or refuses(reply.text),
        first is not None and first.harmful,
        any(verdict.error is not None for verdict in reply.verdicts) or reply.error is not None,
        sum(record.label in REMEDIES for record in reply.passes),
        reply.outcome is Outcome.MENDED,
        round(reply.trace.guard, 6),
        sum(record.computed_tokens for record in reply.passes),
        sum(len(record.token_ids) for record in reply.passes),
        right(case, reply.text) if case.kind is Kind.UTILITY else None,
    )
