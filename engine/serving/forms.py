"""The shapes in which an answer goes over the wire, whole or in pieces: a chat's turn, or a text's continuation."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

from ..async_engine import Progress
from ..request import FinishReason, Outcome, PassRecord, Reply, Verdict
from . import protocol as wire
from .metrics import known_reason
from .policy import Chosen

Body: TypeAlias = wire.ChatCompletion | wire.ChatChunk | wire.Completion


class About(NamedTuple):
    """What every piece of a reply says of it. created: seconds since 1970."""

    id: str
    created: int
    model: str


class Form(Protocol):
    """refusal: the text is what the guard says instead of the answer."""

    endpoint: str

    def whole(self, about: About, reply: Reply, usage: wire.UsageReport, guard: wire.GuardReport) -> Body: ...

    def piece(self, about: About, text: str, refusal: bool = False, first: bool = False) -> Body: ...

    def end(self, about: About, reason: wire.FinishReason, guard: wire.GuardReport) -> Body: ...

    def aside(
        self,
        about: About,
        usage: wire.UsageReport | None = None,
        progress: list[wire.PassProgress] | None = None,
    ) -> Body: ...


class ChatForm:
    endpoint = "chat"

    def whole(self, about: About, reply: Reply, usage: wire.UsageReport, guard: wire.GuardReport) -> Body:
        refused = reply.outcome is Outcome.REFUSED
        message = wire.ReplyMessage(content=None if refused else reply.text, refusal=reply.text if refused else None)
        choice = wire.ChatChoice(message=message, finish_reason=finish_reason(reply))
        return wire.ChatCompletion(**about._asdict(), choices=[choice], usage=usage, guard=guard)

    def piece(self, about: About, text: str, refusal: bool = False, first: bool = False) -> Body:
        delta = wire.Delta(refusal=text) if refusal else wire.Delta(content=text)
        if first:
            delta.role = "assistant"
        return wire.ChatChunk(**about._asdict(), choices=[wire.ChunkChoice(delta=delta)])

    def end(self, about: About, reason: wire.FinishReason, guard: wire.GuardReport) -> Body:
        choice = wire.ChunkChoice(delta=wire.Delta(), finish_reason=reason)
        return wire.ChatChunk(**about._asdict(), choices=[choice], guard=guard)

    def aside(
        self,
        about: About,
        usage: wire.UsageReport | None = None,
        progress: list[wire.PassProgress] | None = None,
    ) -> Body:
        return wire.ChatChunk(**about._asdict(), choices=[], usage=usage, progress=progress)


class TextForm:
    endpoint = "completions"

    def whole(self, about: About, reply: Reply, usage: wire.UsageReport, guard: wire.GuardReport) -> Body:
        refused = reply.outcome is Outcome.REFUSED
        choice = wire.TextChoice(
            text="" if refused else reply.text,
            refusal=reply.text if refused else None,
            finish_reason=finish_reason(reply),
        )
        return wire.Completion(**about._asdict(), choices=[choice], usage=usage, guard=guard)

    def piece(self, about: About, text: str, refusal: bool = False, first: bool = False) -> Body:
        shown, instead = ("", text) if refusal else (text, None)
        choice = wire.TextChoice(text=shown, refusal=instead, finish_reason=None)
        return wire.Completion(**about._asdict(), choices=[choice])

    def end(self, about: About, reason: wire.FinishReason, guard: wire.GuardReport) -> Body:
        return wire.Completion(
            **about._asdict(), choices=[wire.TextChoice(text="", finish_reason=reason)], guard=guard
        )

    def aside(
        self,
        about: About,
        usage: wire.UsageReport | None = None,
        progress: list[wire.PassProgress] | None = None,
    ) -> Body:
        return wire.Completion(**about._asdict(), choices=[], usage=usage, progress=progress)


def finish_reason(reply: Reply) -> wire.FinishReason:
    if reply.outcome is Outcome.REFUSED:
        return "content_filter"
    return "length" if reply.finish_reason is FinishReason.LENGTH else "stop"


def usage_report(reply: Reply) -> wire.UsageReport:
    """Of the first answer: what a client asked for, whatever the guard did besides."""
    first = next((record for record in reply.passes if record.candidate), None)
    prompt = 0 if first is None else first.prompt_tokens
    cached = 0 if first is None else first.cached_tokens
    shown = len(reply.token_ids) or (0 if first is None else len(first.token_ids))
    return wire.UsageReport(
        prompt_tokens=prompt,
        completion_tokens=shown,
        total_tokens=prompt + shown,
        prompt_tokens_details=wire.CachedTokens(cached_tokens=cached),
    )


def guard_report(
    reply: Reply, chosen: Chosen, reveal: bool, replaced: wire.Replacement | None = None
) -> wire.GuardReport:
    """reveal: whether the texts of passes are told that did not go out."""
    trace, last = reply.trace, reply.verdicts[-1] if reply.verdicts else None
    reason = None
    if reply.outcome in (Outcome.REFUSED, Outcome.FLAGGED):
        reason = "remedy failed" if last is None else known_reason(last.error) or "harmful"
        if last is not None and last.harmless:
            reason = "remedy failed"
    shown = {reply.text} if reply.outcome is not Outcome.REFUSED else set()
    return wire.GuardReport(
        policy=chosen.policy,
        release=chosen.release,
        outcome=reply.outcome.value,
        reason=reason,
        rounds=sum(record.candidate and record.label != "answer" for record in reply.passes),
        verdicts=[verdict_report(verdict) for verdict in reply.verdicts],
        added_ms=_ms(trace.guard),
        total_ms=_ms(trace.total),
        first_token_ms=None if trace.first_token is None else _ms(trace.first_token),
        unscreened_characters=trace.unscreened_characters,
        passes=[_pass_report(record, reveal or record.text in shown) for record in reply.passes],
        replaced=replaced,
    )


def verdict_report(verdict: Verdict) -> wire.VerdictReport:
    reason = known_reason(verdict.error)
    return wire.VerdictReport(
        detector=verdict.detector,
        score=None if reason is not None or verdict.score != verdict.score else verdict.score,
        threshold=verdict.threshold,
        harmful=verdict.harmful,
        error=reason,
    )


def progress_report(progress: list[Progress]) -> list[wire.PassProgress]:
    return [wire.PassProgress(**one._asdict()) for one in progress]


def _pass_report(record: PassRecord, told: bool) -> wire.PassReport:
    return wire.PassReport(
        label=record.label,
        model=record.model,
        began_ms=_ms(record.submitted if record.started is None else record.started),
        ended_ms=None if record.finished is None else _ms(record.finished),
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        generated_tokens=len(record.token_ids),
        verdict=None if record.verdict is None else verdict_report(record.verdict),
        failed=record.error is not None and record.error != "canceled",
        text=record.text if told and record.text else None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
