"""A detector folder behind ONNX Runtime, on a thread of its own: texts are handed over, scores are asked for later.

It fails closed: what the thread cannot score raises, and a thread that is dead is an error, never a score. One that
hangs gives no score; whoever waits has the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Condition, Thread

from ..engine.errors import Aborted, BadInput, DetectorClosed, PassError, TooLong
from ..engine.models.heads import HeadSpec
from ..engine.text import Codec
from .detector_folder import DetectorFolder, load_folder
from .session import Cache, Row, Session, State

BATCH_TOKENS = 2048  # of a batch, padding included
CHUNK_TOKENS = 512  # of a text that run at once where the rest can follow
FIRST_ROOM = 256  # tokens that a text's keys and values have room for at first
_CLOSING_SECONDS = 5.0


class OnnxDetector:
    """The detector in a folder.

    folder: a path, or what `load_folder` returned. providers: of ONNX Runtime; None is the CPU, and with
    "CUDAExecutionProvider" folders of fp16 and bf16 run on the GPU. threads: cores that compute a batch; None takes
    all. max_batch: texts at most that run as one batch. Safe to use from any thread.

    Raises a `CheckpointError` for a folder that cannot be used, `BadInput` for providers or numbers that cannot, and
    `MissingExtra`.
    """

    def __init__(
        self,
        folder: str | Path | DetectorFolder,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        max_batch: int = 16,
    ) -> None:
        for name, value in (("threads", threads), ("max_batch", max_batch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadInput(f"{name} must be a whole number of at least 1, not {value!r}")
        self.folder = folder if isinstance(folder, DetectorFolder) else load_folder(folder)
        self._session = Session(self.folder, providers, threads)
        self._max_batch = max_batch
        self._changed = Condition()  # guards the queue, `_closed` and every reading's fields
        self._queue: deque[Reading] = deque()
        self._closed = False
        self._thread = Thread(target=self._work, name=f"onnx detector {self.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def spec(self) -> HeadSpec:
        return self.folder.spec

    @property
    def context(self) -> int:
        """Most tokens of a text."""
        return self.folder.context

    @property
    def vocab_size(self) -> int:
        return self.folder.vocab_size

    @property
    def incremental(self) -> bool:
        """Whether a growing text costs its new tokens only. Otherwise every feed reads all of it."""
        return self.folder.with_past

    @cached_property
    def codec(self) -> Codec:
        """Raises `CheckpointMissing` where the folder's tokenizer does not load."""
        from ..engine.models.backbones import (
            load_tokenizer,  # with `transformers`, which scoring tokens does not need
        )

        return Codec(load_tokenizer(self.folder.path))

    def open(self) -> Reading:
        """A new text. Raises `DetectorClosed`."""
        self.check_alive()
        return Reading(self)

    def score(self, texts_ids: Sequence[Sequence[int]], pool_from: Sequence[int]) -> list[float]:
        """P(harmless) of whole texts, which wait for nothing else: they run in the calling thread.

        pool_from: the first pooled token of each. Raises `TooLong`, `BadInput`, `PassError`, `DetectorClosed`.
        """
        return [state.score for state in self._whole(texts_ids, pool_from)]

    def logits(self, texts_ids: Sequence[Sequence[int]], pool_from: Sequence[int]) -> list[float]:
        """The logits whose sigmoids `score` gives."""
        return [state.logit for state in self._whole(texts_ids, pool_from)]

    def _whole(self, texts_ids: Sequence[Sequence[int]], pool_from: Sequence[int]) -> list[State]:
        self.check_alive()
        start = self._session.start()
        rows = [Row(ids, start, self.checked(ids, first)) for ids, first in zip(texts_ids, pool_from, strict=True)]
        states = [start] * len(rows)
        for batch in _batches([len(row.ids) for row in rows], self._max_batch):
            some = [rows[index] for index in batch]
            caches = self._session.caches(len(some), len(some[0].ids)) if self.incremental else None
            for index, state in zip(batch, self._session.run(some, caches), strict=True):
                states[index] = state
        return states

    def close(self) -> None:
        """End the thread; whatever is still asked for fails. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSING_SECONDS)

    # For readings.

    def checked(self, ids: Sequence[int], pool_from: int) -> int:
        """Raises `TooLong` or `BadInput` for tokens that cannot run; returns `pool_from`, a token of the text."""
        if not len(ids):
            raise BadInput("a text must have at least one token")
        if len(ids) > self.context:
            raise TooLong(f"the text has {len(ids):,} tokens; {self.name} takes {self.context:,}")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise BadInput(
                f"token ids must be whole numbers from 0 to {self.vocab_size - 1}, which is all {self.name} has"
            )
        if pool_from < 0:
            raise BadInput(f"pool_from must be at least 0, not {pool_from}")
        return min(pool_from, len(ids) - 1)

    def check_alive(self) -> None:
        """Raises `DetectorClosed` after `close`, `PassError` where the thread is dead."""
        if self._closed:
            raise DetectorClosed(f"{self.name} was closed; make another OnnxDetector")
        if not self._thread.is_alive():
            raise PassError(f"the thread of {self.name} is dead")

    # The thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                taken = [self._queue.popleft() for _ in range(len(self._queue))]
                jobs = [(reading, row) for reading in taken if (row := reading._next()) is not None]
            fresh = [job for job in jobs if not job[1].past.tokens]
            groups = [
                [fresh[index] for index in batch]
                for batch in _batches([len(row.ids) for _, row in fresh], self._max_batch)
            ]
            # ONNX Runtime's attention takes one text at a time where there is a past
            for group in [[job] for job in jobs if job[1].past.tokens] + groups:
                self._run(group)

    def _run(self, group: list[tuple[Reading, Row]]) -> None:
        rows = [row for _, row in group]
        found: list[State] | PassError
        try:
            caches = self._caches(group) if self.incremental else None
            found = self._session.run(rows, caches)
        except PassError as error:
            found = error
        except Exception as error:  # out of memory, for one
            found = PassError(f"{self.name} failed: {error}")
        with self._changed:
            for index, (reading, _) in enumerate(group):
                reading._took(found if isinstance(found, PassError) else found[index])
            done = [reading.on_done for reading, _ in group if reading._is_done]
        for tell in done:
            if tell is not None:
                with suppress(Exception):  # the thread is everybody's
                    tell()

    def _caches(self, group: list[tuple[Reading, Row]]) -> list[Cache]:
        """Keys and values of the group's readings, with room for what is to run now."""
        need = max(len(row.ids) for _, row in group)
        room = FIRST_ROOM
        while room < need:
            room *= 2
        room = min(room, self.context)
        if not group[0][1].past.tokens:
            for (reading, _), cache in zip(group, self._session.caches(len(group), room), strict=True):
                reading._cache = cache
        for reading, _ in group:
            assert reading._cache is not None
            if reading._cache.capacity < need:
                reading._cache = self._session.enlarged(reading._cache, room)
        return [reading._cache for reading, _ in group if reading._cache is not None]


class Reading:
    """One text, given as far as it is known, as often as it grows.

    on_done: called in the detector's thread whenever `poll` would give something or raise; it must return soon.
    """

    def __init__(self, detector: OnnxDetector) -> None:
        self.on_done: Callable[[], None] | None = None
        self._detector = detector
        self._ids: list[int] = []
        self._pool_from = 0
        self._states = [detector._session.start()]  # after every chunk, shortest first
        self._cache: Cache | None = None
        self._keep = 0  # tokens at the front of the running chunk's text that no feed has changed since
        self._running = False
        self._queued = False
        self._error: PassError | None = None

    def feed(self, keep: int, ids: Sequence[int], pool_from: int) -> None:
        """ids: all tokens of the text so far; the first `keep` are as they were in the last feed. Returns at once.

        pool_from: the first token that a mean head pools. Raises `TooLong` and `BadInput` before anything is queued,
        `DetectorClosed` and `PassError` as `poll` does.
        """
        first = self._detector.checked(ids, pool_from)
        self._detector.check_alive()
        with self._detector._changed:
            if self._error is not None:
                raise self._error
            keep = min(keep, len(self._ids), len(ids))
            if first != self._pool_from:  # the sum begins anew where it could have differed
                keep = min(keep, first, self._pool_from)
            self._ids, self._pool_from = list(ids), first
            self._keep = min(self._keep, keep)
            while self._states[-1].tokens > keep:
                self._states.pop()
            self._go_on()

    def poll(self) -> float | None:
        """P(harmless) of the tokens of the last feed; None while they are under way.

        Raises `PassError` where there will be no score: the run failed, the reading was canceled, the detector was
        closed or its thread is dead.
        """
        with self._detector._changed:
            if self._error is not None:
                raise self._error
            if self._is_scored:
                return self._states[-1].score
        self._detector.check_alive()
        return None

    def cancel(self) -> None:
        """Drop the text and its keys and values, perhaps after what runs just now."""
        with self._detector._changed:
            self._error = self._error or Aborted("the reading was canceled")
            self._cache = None

    # For the detector, under its lock.

    @property
    def _is_scored(self) -> bool:
        return bool(self._ids) and self._states[-1].tokens == len(self._ids)

    @property
    def _is_done(self) -> bool:
        return self._error is not None or self._is_scored

    def _go_on(self) -> None:
        """Queue what is left to run."""
        if not (self._is_done or self._queued or self._running):
            self._queued = True
            self._detector._queue.append(self)
            self._detector._changed.notify_all()

    def _next(self) -> Row | None:
        """What runs now; None where it is not wanted any more."""
        self._queued = False
        if self._is_done:
            return None
        if self._detector.incremental:
            past = self._states[-1]
            ids = self._ids[: past.tokens + CHUNK_TOKENS]
        else:
            past, ids = self._states[0], self._ids
        self._keep, self._running = len(ids), True
        return Row(ids, past, self._pool_from)

    def _took(self, found: State | PassError) -> None:
        """Take what a run gave; where the text has changed meanwhile, it was for nothing."""
        self._running = False
        if isinstance(found, PassError):
            self._error = self._error or found
        elif found.tokens <= self._keep:
            self._states.append(found)
        if self._error is not None:
            self._cache = None
        self._go_on()


def _batches(lengths: Sequence[int], most: int) -> Iterable[list[int]]:
    """Indices of texts that run together: of similar lengths, `most` at most, about BATCH_TOKENS tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) == most or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
