"""The engine behind asyncio: one thread steps it, coroutines of any event loop submit, stream and cancel.

It speaks no protocol, installs no signal handler and keeps no state outside its objects.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from math import isfinite
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from .chat import Chat
from .engine import Engine, GuardLike
from .errors import Aborted, DeadlineExceeded, EngineStopped, Overloaded
from .passes import ReleaseMode
from .request import FinishReason, Replaced, Reply
from .running import OutsideRun, Request, Run
from .sampling import SamplingParams

GRACE = 5.0  # seconds past a deadline until a waiter no longer relies on the stepping thread to say so
STALLED = 60.0  # seconds in one step after which the engine is not ready
Result = TypeVar("Result")


class Progress(NamedTuple):
    """How far a pass is. tokens: generated. score: P(harmless) of the last beginning that a screen has judged."""

    label: str
    model: str
    tokens: int
    score: float | None
    ended: bool


class AsyncRequest:
    """A request under way. `async for` gives its text as it may be shown, `reply()` its end.

    Both raise `Aborted`, `DeadlineExceeded` or `EngineStopped` where there is no reply; `final` is then what the
    engine said of the aborted request, if it could. One task reads it, on the event loop that began it.
    """

    def __init__(self, owner: AsyncEngine, deadline: float | None, watched: bool) -> None:
        self.deadline = deadline  # of `time.monotonic`
        self.final: Reply | None = None
        self.progress: list[Progress] = []
        self.request: Request | None = None  # this and what follows: the stepping thread's
        self.told: list[Progress] = []
        self.watched = watched
        self.loop = asyncio.get_running_loop()
        self.failure: Exception | None = None  # why the stepping thread ends it
        self._owner = owner
        self._items: deque[str | Replaced] = deque()
        self._error: Exception | None = None
        self._done = False
        self._news = asyncio.Event()

    @property
    def done(self) -> bool:
        return self._done

    def abort(self) -> None:
        """End it at once; nothing more of it is shown. Does nothing to a request that has ended."""
        if not self._done:
            self._owner.end(self, Aborted("the request was aborted"))

    def __aiter__(self) -> AsyncRequest:
        return self

    async def __anext__(self) -> str | Replaced:
        while not self._items:
            if self._done:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self.changed()
        return self._items.popleft()

    def take(self) -> list[str | Replaced]:
        """What may be shown and was not taken yet, without waiting."""
        items = list(self._items)
        self._items.clear()
        return items

    @property
    def error(self) -> Exception | None:
        """Why there is no reply, once it has ended."""
        return self._error

    async def reply(self) -> Reply:
        while not self._done:
            await self.changed()
        if self._error is not None:
            raise self._error
        assert self.final is not None
        return self.final

    async def changed(self) -> None:
        """Wait until there is text, progress or the end. Past its deadline a request ends even where the stepping
        thread hangs."""
        self._news.clear()
        try:
            if self.deadline is None:
                await self._news.wait()
            else:
                async with asyncio.timeout(max(0.0, self.deadline + GRACE - monotonic())):
                    await self._news.wait()
        except TimeoutError:
            error = DeadlineExceeded("the request's time is over, and the engine does not answer")
            self._owner.end(self, error)
            self.deliver([], [], None, error)

    def deliver(
        self, items: list[str | Replaced], progress: list[Progress], final: Reply | None, error: Exception | None
    ) -> None:
        """Take what a step made ready; on the request's own event loop."""
        if self._done:
            return
        self._items.extend(items)
        self.progress = progress
        if final is not None or error is not None:
            self._done, self.final, self._error = True, final, error
            if error is not None:
                self._items.clear()
        self._news.set()


class AsyncEngine:
    """Serves one engine to any number of coroutines; several may live in one process, each with a thread.

    engine: belongs to this object from now on; nobody else calls it. max_requests: under way at once; more are
    refused with `Overloaded`. What a slow reader leaves unread is never more than its one answer.

    The thread runs until `drain` or `close`.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 256) -> None:
        self.engine = engine
        self.max_requests = max_requests
        self.reply_seconds = 1.0  # a moving average, for whoever has to be told when to come again
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._open: set[AsyncRequest] = set()  # let in and not ended
        self._live: dict[int, AsyncRequest] = {}  # by the engine's id; the thread's own
        self._draining = self._closed = False
        self._crash: BaseException | None = None
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="stockade-steps", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain(0.0)

    # Health.

    @property
    def alive(self) -> bool:
        """Whether the stepping thread runs; where it does not, only a new process helps."""
        return self._thread.is_alive() and self._crash is None

    @property
    def ready(self) -> bool:
        """Whether a request would be let in and served: alive, not draining, not hanging in one step."""
        since = self._busy_since
        return self.alive and not self._draining and (since is None or monotonic() - since < STALLED)

    @property
    def under_way(self) -> int:
        """Requests let in that have not ended."""
        return len(self._open)

    # Requests.

    async def chat(
        self,
        messages: Any,
        *,
        guard: GuardLike | None = None,
        sampling: SamplingParams | None = None,
        salt: str | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """Answer one chat; canceling the task aborts the request. timeout: seconds, queueing included.

        Raises what `Engine.submit` raises, and `Overloaded`, `DeadlineExceeded`, `EngineStopped`.
        """
        request = await self.submit(messages, guard=guard, sampling=sampling, salt=salt, timeout=timeout)
        try:
            return await request.reply()
        finally:
            request.abort()

    async def stream(
        self,
        messages: Any,
        *,
        guard: GuardLike | None = None,
        sampling: SamplingParams | None = None,
        salt: str | None = None,
        release: ReleaseMode = "verdict",
        timeout: float | None = None,
    ) -> AsyncGenerator[str | Replaced, None]:
        """Yield the text as it may be shown (see `Engine.stream`); closing it aborts the request.

        Raises as `chat`.
        """
        request = await self.submit(
            messages, guard=guard, sampling=sampling, salt=salt, release=release, streaming=True, timeout=timeout
        )
        try:
            async for item in request:
                yield item
        finally:
            request.abort()

    async def submit(
        self,
        messages: Any,
        *,
        guard: GuardLike | None = None,
        sampling: SamplingParams | None = None,
        salt: str | None = None,
        release: ReleaseMode = "verdict",
        streaming: bool = False,
        timeout: float | None = None,
    ) -> AsyncRequest:
        """Queue a chat; whoever leaves it before its end calls `abort`. Raises as `chat`.

        Images are decoded in a thread of the event loop's own pool.
        """
        self.check_room()
        if not isinstance(messages, Chat | str):
            messages = await asyncio.to_thread(Chat.parse, messages, self.engine.image_limits)
        return await self.begin(
            lambda engine: engine.submit(
                messages, guard=guard, sampling=sampling, salt=salt, streaming=streaming, release=release
            ),
            timeout=timeout,
        )

    async def begin(
        self, submit: Callable[[Engine], Request], *, timeout: float | None = None, watched: bool = False
    ) -> AsyncRequest:
        """Let a request in. submit: queues it and gives its handle, in the stepping thread. watched: its passes are
        told of while they run, in `AsyncRequest.progress`. Raises as `chat`."""
        request = AsyncRequest(self, None if timeout is None else monotonic() + timeout, watched)
        with self._changed:
            self.check_room()
            self._open.add(request)
        try:
            await self.call(partial(self._begin, request, submit))
        except BaseException:
            if request.request is None:
                self._forget(request)
            request.abort()  # it may have begun all the same
            raise
        return request

    def check_room(self) -> None:
        """Raises `EngineStopped` or `Overloaded` where one more request would not be let in."""
        if self._draining or not self.alive:
            raise EngineStopped("the engine takes no more requests: it is shutting down, or has stopped")
        if len(self._open) >= self.max_requests:
            raise Overloaded(
                f"{len(self._open)} requests are under way, which is the limit; come again later",
                retry_after=self.reply_seconds,
            )

    async def call(self, function: Callable[[Engine], Result]) -> Result:
        """What a function of the engine gives, called between two steps in the stepping thread: keep it short.

        Raises what it raises, and `EngineStopped`.
        """
        return await asyncio.wrap_future(self._post(partial(function, self.engine)))

    def end(self, request: AsyncRequest, error: Exception) -> None:
        """Abort a request; its reader gets the error."""
        if request.failure is None:
            request.failure = error
            with self._changed:
                self._changed.notify()

    # The end.

    async def drain(self, timeout: float | None = None) -> None:
        """Let nobody in, wait until all under way have ended (or `timeout` seconds), abort the rest, and close."""
        self._draining = True
        until = None if timeout is None else monotonic() + timeout
        while self._open and self.alive and (until is None or monotonic() < until):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Abort all that is under way and end the thread, when the step that it is in has ended.

        A step that hangs is not waited for; its thread ends with the process.
        """
        self._draining = True
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(STALLED)

    # The stepping thread.

    def _run(self) -> None:
        crash: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as error:  # whatever it is, nobody may wait for it forever
            crash = error
        self._stop(crash)

    def _turn(self) -> bool:
        """Do what callers asked for, run one step, hand out what it gave; False when it is over."""
        engine = self.engine
        with self._changed:
            self._busy_since = None
            while not (self._inbox or engine.has_work or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            calls, self._inbox = self._inbox, deque()
            self._busy_since = monotonic()
        for function, future in calls:
            _call(function, future)
        self._expire()
        if engine.has_work:
            engine.step()
        self._hand_out()
        return True

    def _begin(self, request: AsyncRequest, submit: Callable[[Engine], Request], engine: Engine) -> None:
        if request.failure is not None:
            raise request.failure
        request.request = submit(engine)
        self._live[request.request.id] = request

    def _expire(self) -> None:
        now = monotonic()
        for number, request in self._live.items():
            assert request.request is not None
            if request.request.reply is not None:
                continue
            if request.failure is None and request.deadline is not None and now > request.deadline:
                request.failure = DeadlineExceeded("the request's time is over")
            if request.failure is not None:
                self.engine.abort(number)

    def _hand_out(self) -> None:
        """One call for each event loop and step, whatever the number of its requests."""
        news: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        for number, request in list(self._live.items()):
            state = request.request
            assert state is not None
            items, final, error = state.take(), state.reply, None
            if final is not None:
                del self._live[number]
                self._forget(request)
                self.reply_seconds += 0.1 * (final.trace.total - self.reply_seconds)
                if final.finish_reason is FinishReason.ABORTED:
                    error = request.failure or Aborted("the request was aborted")
            progress = _progress(state) if request.watched else []
            if items or final is not None or progress != request.told:
                request.told = progress
                news.setdefault(request.loop, []).append(partial(request.deliver, items, progress, final, error))
        for loop, deliveries in news.items():
            self._tell(loop, deliveries)

    def _stop(self, crash: BaseException | None) -> None:
        """Nothing is stepped from now on: end every request and every call with the reason."""
        why = "the engine is shut down" if crash is None else f"the engine has stopped: {type(crash).__name__}"
        with self._changed:
            self._crash, self._draining, self._busy_since = crash, True, None
            calls, self._inbox = self._inbox, deque()
            left = list(self._open)
            self._open.clear()
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineStopped(why))
        for request in left:
            state = request.request
            if crash is None and state is not None and state.reply is None:
                with suppress(Exception):  # whatever it says, the others must be told
                    self.engine.abort(state.id)
            self._tell(request.loop, [partial(request.deliver, [], [], None, EngineStopped(why))])
        self._live.clear()

    def _tell(self, loop: asyncio.AbstractEventLoop, deliveries: list[Callable[[], None]]) -> None:
        try:
            loop.call_soon_threadsafe(_all, deliveries)
        except RuntimeError:  # the event loop is closed: nobody reads what is left of its requests
            for request in self._live.values():
                if request.loop is loop and request.failure is None:
                    request.failure = Aborted("its event loop is closed")

    def _post(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            if self._crash is not None or self._closed:
                raise EngineStopped("the engine is shut down, or has stopped")
            self._inbox.append((function, future))
            self._changed.notify()
        return future

    def _forget(self, request: AsyncRequest) -> None:
        with self._changed:
            self._open.discard(request)


def _progress(request: Request) -> list[Progress]:
    return [
        _progress_of(request.runs.get(number))
        or Progress(record.label, record.model, len(record.token_ids), None, record.finished is not None)
        for number, record in enumerate(request.passes)
    ]


def _progress_of(run: Run | OutsideRun | None) -> Progress | None:
    """Of a pass that has not ended and that makes tokens."""
    if not isinstance(run, Run):
        return None
    score = None if run.screening is None else run.screening.score
    tokens = max(0, run.sequence.num_tokens - run.sequence.prompt_tokens)
    found = score if score is not None and isfinite(score) else None
    return Progress(run.record.label, run.record.model, tokens, found, False)


def _call(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _all(deliveries: list[Callable[[], None]]) -> None:
    for deliver in deliveries:
        deliver()
