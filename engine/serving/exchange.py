"""One request from when it is let in until its reply has left: whole or as a stream, written down, counted.

No text leaves before its line is in the audit log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..async_engine import AsyncRequest
from ..chat import Chat
from ..errors import Aborted, AuditFailed, DeadlineExceeded, PassError
from ..request import FinishReason, Outcome, Replaced, Reply
from . import protocol as wire
from .forms import About, Form, finish_reason, guard_report, progress_report, usage_report, verdict_report
from .http_errors import failure
from .limits import Tenant
from .metrics import known_reason
from .policy import Chosen

if TYPE_CHECKING:
    from .service import Service

KEEP_ALIVE = 10.0  # seconds of silence after which a stream says that it is there
DONE = b"data: [DONE]\n\n"


class Exchange:
    """One request that was let in, until its reply has left. Exactly one of `whole` and `events` is used, once."""

    def __init__(
        self,
        service: Service,
        form: Form,
        chosen: Chosen,
        tenant: Tenant,
        chat: Chat,
        about: About,
        parent: str | None,
    ) -> None:
        self._service = service
        self._form = form
        self._chosen = chosen
        self._tenant = tenant
        self._chat = chat
        self._about = about
        self._parent = parent
        self._request: AsyncRequest | None = None
        self._began = 0.0
        self._shown = 0  # characters that were handed over to be sent
        self._progress = self._usage = False

    async def begin(self, body: wire.Sampled, began: float, submit: Callable[[Any], Any]) -> None:
        """began: of `time.monotonic`, from when on the deadline counts."""
        settings = self._service.settings
        seconds = min(body.timeout or settings.deadline, settings.deadline)
        left = began + seconds - monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's time is over")
        self._began = began
        self._progress = bool(body.guard and body.guard.progress)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._request = await self._service.engine.begin(submit, timeout=left, watched=self._progress)

    def abort(self) -> None:
        """The client is gone."""
        if self._request is not None:
            self._request.abort()

    async def whole(self) -> bytes:
        """The reply as JSON. Raises `PassError` where the answer failed, and as `AsyncRequest.reply` does."""
        request = self._request
        assert request is not None
        try:
            reply = await request.reply()
            self._check(reply)
            self._decided(reply)
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            request.abort()
        self._told(reply)
        guard = guard_report(reply, self._chosen, self._service.settings.reveal)
        return self._form.whole(self._about, reply, usage_report(reply), guard).model_dump_json().encode()

    async def events(self) -> AsyncIterator[bytes]:
        """The reply as server-sent events; a failure is an event, too. Closing it aborts the request."""
        request = self._request
        assert request is not None
        ended = False
        try:
            yield self._event(self._form.piece(self._about, "", first=True))
            async for event in self._live(request):
                yield event
            if request.error is not None:
                raise request.error
            reply = request.final
            assert reply is not None
            self._check(reply)
            rest = request.take()
            self._decided(reply, any(isinstance(item, Replaced) for item in rest))
            self._told(reply)
            ended = True
            for event in self._last(reply, rest):
                yield event
            yield DONE
        except Aborted as error:  # there is nobody to tell
            ended = True
            self._failed(error)
        except Exception as error:
            ended = True
            self._failed(error)
            yield self._error(error)
        finally:
            request.abort()
            if not ended:
                self._failed(Aborted("the client is gone"))

    async def _live(self, request: AsyncRequest) -> AsyncIterator[bytes]:
        """What may leave before the end."""
        told: list[Any] = []
        while not request.done:
            for item in request.take():
                # what takes the place of a text comes at the end only, and `_last` tells it
                assert isinstance(item, str)
                if not self._shown:
                    self._write("release")
                    self._left()
                self._shown += len(item)
                yield self._event(self._form.piece(self._about, item))
            if self._progress and request.progress != told:
                told = request.progress
                yield self._event(self._form.aside(self._about, progress=progress_report(told)))
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    await request.changed()
            except TimeoutError:
                yield b": the answer is on its way\n\n"

    def _last(self, reply: Reply, rest: list[str | Replaced]) -> list[bytes]:
        """What leaves at the end: the rest of the text, or what takes its place; then the guard's report."""
        form, about, out = self._form, self._about, []
        replaced = next((item for item in rest if isinstance(item, Replaced)), None)
        if replaced is not None and not self._shown:  # for this client it replaces nothing
            replaced, rest = None, [reply.text]
        if replaced is not None or reply.outcome is Outcome.REFUSED:
            out.append(form.piece(about, reply.text, refusal=True))
        else:
            out += [form.piece(about, item) for item in rest if isinstance(item, str)]
        if not self._shown:
            self._left()
        instead = None if replaced is None else wire.Replacement(text=reply.text, released_characters=self._shown)
        guard = guard_report(reply, self._chosen, self._service.settings.reveal, instead)
        reason = "content_filter" if replaced is not None else finish_reason(reply)
        out.append(form.end(about, reason, guard))
        if self._usage:
            out.append(form.aside(about, usage=usage_report(reply)))
        return [self._event(body) for body in out]

    def _check(self, reply: Reply) -> None:
        if reply.finish_reason is FinishReason.ERROR:
            raise PassError("the answer could not be computed")

    def _decided(self, reply: Reply, replaced: bool = False) -> None:
        """Write the decision down. Raises `AuditFailed`, and then nothing may leave."""
        audit = self._service.audit
        if audit is None:
            return
        judged = [record for record in reply.passes if record.candidate]
        self._write(
            "decision",
            outcome=reply.outcome.value,
            decided_by=reply.verdicts[-1].detector if reply.verdicts else "policy",
            verdicts=[verdict_report(verdict).model_dump() for verdict in reply.verdicts],
            reason=known_reason(reply.verdicts[-1].error) if reply.verdicts else None,
            answers=[audit.said("answer", record.text) for record in judged],
            replaced_characters=self._shown if replaced else 0,
            unscreened_characters=reply.trace.unscreened_characters,
            **audit.said("released", reply.text),
        )

    def _told(self, reply: Reply) -> None:
        self._service.metrics.replied(self._form.endpoint, self._chosen.policy, reply)
        if self._service.spans is not None:
            self._service.spans.record(self._about.id, self._chosen, reply, self._parent)

    def _failed(self, error: BaseException) -> None:
        """A request ended without a reply; what had left by then is told."""
        outcome = type(error).__name__ if isinstance(error, Exception) else "Aborted"
        request, metrics = self._request, self._service.metrics
        metrics.ended(self._form.endpoint, self._chosen.policy, outcome)
        if request is not None and request.final is not None:
            metrics.replied(self._form.endpoint, self._chosen.policy, request.final)
        audit = self._service.audit
        if audit is not None and audit.writable:
            with suppress(AuditFailed):  # nothing but the error leaves
                self._write("failure", error=outcome, shown_characters=self._shown)

    def _left(self) -> None:
        self._service.metrics.sent_first.labels(self._chosen.release).observe(monotonic() - self._began)

    def _write(self, event: str, **facts: Any) -> None:
        audit = self._service.audit
        if audit is None:
            return
        audit.write(
            event,
            request=self._about.id,
            endpoint=self._form.endpoint,
            key=self._tenant.name,
            policy=self._chosen.policy,
            release=self._chosen.release,
            **audit.asked(self._chat),
            **facts,
        )

    def _event(self, body: Any) -> bytes:
        left_out = {name for name in ("usage", "guard", "progress") if getattr(body, name) is None}
        return b"data: " + body.model_dump_json(exclude=left_out).encode() + b"\n\n"

    def _error(self, error: Exception) -> bytes:
        return b"data: " + failure(error).body.model_dump_json().encode() + b"\n\n"
