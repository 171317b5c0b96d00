"""A detector that other processes run: the engine's side of it, and the side that scores.

It fails closed: a call that is lost is asked once more, and whatever then gives no score in its time is an error.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cached_property
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeAlias

from ..errors import Aborted, BadInput, DetectorClosed, PassError, PassTimeout, ReplicaLost, TooLong
from ..models.heads import HeadSpec
from ..text import Codec

if TYPE_CHECKING:
    from ...export.detector_folder import DetectorFolder
    from ...export.onnx_detector import OnnxDetector
    from ...export.onnx_detector import Reading as LocalReading

Ask: TypeAlias = Callable[[str, list[int], int], Awaitable[float]]
"""Name of a text, its tokens so far, the first pooled one -> P(harmless). Raises `ReplicaLost`, `PassError`."""

READINGS = 256  # texts whose keys and values a scoring process keeps
SECONDS = 20.0  # for one score; a guard's own timeout may be shorter
_LOOK = 0.5  # seconds after which a score that is waited for is looked for again


class RemoteDetector:
    """The detector in a folder, scored elsewhere; an `OutsideDetector`. folder: its description and tokenizer are
    read here, its weights there. ask: called in an event loop of this object's own thread."""

    def __init__(self, folder: DetectorFolder, ask: Ask, seconds: float = SECONDS) -> None:
        self.folder = folder
        self.ask = ask
        self.seconds = seconds
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._thread = Thread(target=self._work, name=f"remote detector {folder.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def spec(self) -> HeadSpec:
        return self.folder.spec

    @property
    def context(self) -> int:
        return self.folder.context

    @property
    def vocab_size(self) -> int:
        return self.folder.vocab_size

    @property
    def incremental(self) -> bool:
        return self.folder.with_past

    @cached_property
    def codec(self) -> Codec:
        from ..models.backbones import load_tokenizer

        return Codec(load_tokenizer(self.folder.path))

    def open(self) -> RemoteReading:
        """Raises `DetectorClosed`."""
        self.check_alive()
        return RemoteReading(self)

    def close(self) -> None:
        with suppress(RuntimeError):  # it was closed before
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def check_alive(self) -> None:
        """Raises `DetectorClosed`."""
        if not self._thread.is_alive():
            raise DetectorClosed(f"{self.name} was closed, or its thread has died")

    def start(self, reading: RemoteReading) -> None:
        """Raises `DetectorClosed`."""
        try:
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(reading.run()))
        except RuntimeError:
            raise DetectorClosed(f"{self.name} was closed") from None

    def _work(self) -> None:
        with self._runner:  # which cancels what is under way at the end
            self._loop.run_forever()


class RemoteReading:
    """One text, as far as it is known; one call at a time is under way for it, always with all its tokens."""

    def __init__(self, detector: RemoteDetector) -> None:
        self.on_done: Callable[[], None] | None = None
        self._detector = detector
        self._name = secrets.token_hex(8)
        self._lock = Lock()  # guards what follows
        self._ids: list[int] = []
        self._pool_from = 0
        self._fed = 0
        self._scored = 0  # the feed that `_score` is of
        self._score = 0.0
        self._running = False
        self._error: PassError | None = None

    def feed(self, keep: int, ids: Sequence[int], pool_from: int) -> None:
        """See `Reading`; what of the text is known there already is found there."""
        detector = self._detector
        if not len(ids) or pool_from < 0:
            raise BadInput("a text must have at least one token, and pool_from be at least 0")
        if len(ids) > detector.context:
            raise TooLong(f"the text has {len(ids):,} tokens; {detector.name} takes {detector.context:,}")
        detector.check_alive()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._ids, self._pool_from = list(ids), pool_from
            self._fed += 1
            if self._running:
                return
            self._running = True
        detector.start(self)

    def poll(self) -> float | None:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._fed and self._scored == self._fed:
                return self._score
        self._detector.check_alive()
        return None

    def cancel(self) -> None:
        with self._lock:
            self._error = self._error or Aborted("the reading was canceled")

    async def run(self) -> None:
        """Ask until the last feed has its score; in the detector's thread."""
        while True:
            with self._lock:
                if self._error is not None or self._scored == self._fed:
                    self._running = False
                    break
                fed, ids, pool_from = self._fed, self._ids, self._pool_from
            try:
                score = await self._asked(ids, pool_from)
                with self._lock:
                    self._scored, self._score = fed, score
            except Exception as error:
                with self._lock:
                    self._error = self._error or _failure(self._detector.name, error)
        if self.on_done is not None:
            self.on_done()

    async def _asked(self, ids: list[int], pool_from: int) -> float:
        ask = self._detector.ask
        async with asyncio.timeout(self._detector.seconds):
            try:
                return await ask(self._name, ids, pool_from)
            except ReplicaLost:
                return await ask(self._name, ids, pool_from)


class Scorer:
    """A detector for callers elsewhere: keeps their texts, so that one that grows costs its new tokens only.

    All calls come on one event loop.
    """

    def __init__(self, detector: OnnxDetector) -> None:
        self.detector = detector
        self._readings: OrderedDict[str, tuple[LocalReading, list[int]]] = OrderedDict()

    async def score(self, name: str, ids: list[int], pool_from: int) -> float:
        """P(harmless) of a text. name: of the text; what it has in common with its last call is not read again.

        Raises `PassError` and `BadInput`; the text is forgotten then.
        """
        reading, before = self._readings.pop(name) if name in self._readings else (self.detector.open(), [])
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(done.set)

        reading.on_done = tell
        try:
            reading.feed(_common(before, ids), ids, pool_from)
            while (score := reading.poll()) is None:
                with suppress(TimeoutError):  # a dead thread tells nobody
                    async with asyncio.timeout(_LOOK):
                        await done.wait()
                done.clear()
        except BaseException:
            reading.cancel()
            raise
        self._readings[name] = (reading, ids)
        while len(self._readings) > READINGS:
            self._readings.popitem(last=False)[1][0].cancel()
        return score


def _common(before: list[int], now: list[int]) -> int:
    """Tokens that both begin with."""
    differing = (at for at, (one, other) in enumerate(zip(before, now, strict=False)) if one != other)
    return next(differing, min(len(before), len(now)))


def _failure(name: str, error: Exception) -> PassError:
    if isinstance(error, PassError):
        return error
    if isinstance(error, TimeoutError):
        return PassTimeout(f"{name} gave no score in its time")
    return PassError(f"{name} failed: {type(error).__name__}")
