"""A detector that reads along: which of its tokens are known, what it said of which beginning, what that decides.

It holds state and runs nothing; the engine gives it text and scores, and asks what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from math import nan
from time import perf_counter
from typing import Protocol

from .errors import BadInput, PassTimeout, TooLong
from .growing import GrowingPrompt
from .models.model import Model
from .outside import OutsideDetector
from .passes import Release, Screen, Screened
from .request import PassRecord
from .scheduler import Scheduler
from .sequence import Sequence


class Reader(Protocol):
    """What reads a screen's tokens, inside the engine or outside. idle: whether it has read all that it was given."""

    deadline: float | None

    @property
    def record(self) -> PassRecord: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def idle(self) -> bool: ...

    def read(self, keep: int, ids: Many[int], pool_from: int, more: bool) -> None:
        """The tokens are `ids` now, of which it has the first `keep`; a mean is over those from `pool_from` on. more:
        whether there may be others still. Raises a `BadInput` or `PassError`."""

    def stop(self) -> None: ...


@dataclass(eq=False)
class InLane:
    """A sequence of the engine's own as a reader."""

    sequence: Sequence
    scheduler: Scheduler

    @property
    def record(self) -> PassRecord:
        return self.sequence.record

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_tokens

    @property
    def idle(self) -> bool:
        return not self.sequence.remaining

    @property
    def deadline(self) -> float | None:
        return self.sequence.deadline

    @deadline.setter
    def deadline(self, when: float | None) -> None:
        self.sequence.deadline = when

    def read(self, keep: int, ids: Many[int], pool_from: int, more: bool) -> None:
        sequence = self.sequence
        self.scheduler.replace_tail(sequence, keep, ids)
        assert sequence.model.spec is not None
        if sequence.model.spec.pooling == "mean":
            sequence.pool_from = min(pool_from, sequence.num_tokens - 1)
        sequence.open = more

    def stop(self) -> None:
        self.scheduler.remove(self.sequence)


class Screening:
    """The screen of one answer.

    text, tokens: of the answer so far. waiting: tokens that no chunk covers. input_characters: of the tokens that
    were inputs of the answering model already. cleared: how many characters a beginning covers that was found
    harmless. harmful: whether the last judged beginning was not. eager: whether anything waits for what is said of
    beginnings. doomed: whether the answer is not worth finishing.
    """

    def __init__(self, screen: Screen, model: Model | OutsideDetector, release: Release) -> None:
        """release: when the answer's text may leave."""
        assert model.spec is not None
        spec = model.spec
        self.screen = screen
        self.model = model
        self.reader: Reader | None = None  # None while there is no text, and for a tap
        self.growing = None if screen.before is None else GrowingPrompt(model.codec, screen.before)
        self.threshold = spec.threshold
        prefix = (screen.prefix_threshold, screen.threshold, spec.prefix_threshold, spec.threshold)
        self.prefix_threshold = next(value for value in prefix if value is not None)
        self.text = ""
        self.tokens = 0
        self.waiting = 0
        self.input_characters = 0
        self.cleared = 0
        self.harmful = False
        self.error: str | None = None
        self.closed = False
        self.ended: float | None = None  # when the answer ended, in seconds of the request
        self.eager = release == "window" or screen.stop_below is not None
        self._stops = release != "audit"  # where the screen fails
        self._score = nan
        self._final = False  # whether `_score` is of the whole text
        self._fed = 0  # characters handed to the reader, and covered by it once it has read them
        self._judged = -1  # characters of the last judged beginning
        self._low = 0  # beginnings in a row that scored below `stop_below`

    @property
    def idle(self) -> bool:
        """Whether all that the reader was given is read."""
        return self.reader is None or self.reader.idle

    @property
    def doomed(self) -> bool:
        if self.error is not None:
            return self._stops
        return self.screen.stop_below is not None and self._low >= self.screen.patience

    @property
    def done(self) -> bool:
        """Whether nothing more will be known."""
        return self.error is not None or self._final

    @property
    def score(self) -> float:
        """Of the last judged beginning; NaN where there is none."""
        return self._score

    @property
    def result(self) -> Screened:
        return Screened(self.screen, nan if self.error else self._score, self.threshold, self.error)

    def follow(self, new: Callable[[Many[int]], Reader]) -> None:
        """Give the reader the tokens of the new text, all of them once the answer is closed. new: makes a reader that
        may have read the given tokens already.

        Raises `TooLong` for more tokens than the detector takes, and as encoding and the reader do.
        """
        assert self.growing is not None
        growing, pooled = self.growing, self.growing.pool_from
        keep, _ = growing.append(self.text[len(growing.text) :])
        if self.closed:
            keep = min(keep, growing.close()[0])
        # what is held back, in tokens of the answer as long as its mean one
        self.waiting = -(-(len(self.text) - growing.covers) * self.tokens // max(1, len(self.text)))
        if len(growing.ids) > self.model.context:
            raise TooLong(f"the text has {len(growing.ids):,} tokens; {self.model.name} takes {self.model.context:,}")
        vocabulary = self.model.vocab_size
        if max(growing.ids[keep if self.reader else 0 :], default=0) >= vocabulary:
            raise BadInput(f"the text has tokens that {self.model.name} has no weights for: it has {vocabulary:,}")
        if self.reader is None:
            if not growing.covers and not self.closed:
                return
            self.reader = new(growing.ids)
            keep = self.reader.num_tokens
        elif growing.pool_from != pooled:  # where the answer's first token moved, the running sum begins anew
            keep = min(keep, pooled, growing.pool_from)
        self.reader.read(keep, growing.ids, growing.pool_from, not self.closed)
        self._fed = len(self.text) if self.closed else growing.covers
        if self.closed:
            if self.screen.timeout is not None:
                self.reader.deadline = perf_counter() + self.screen.timeout
            # where the end of the text added no token, what was said of it stands
            self._final = self.reader.idle

    def judge(self, score: float, covers: int | None = None) -> None:
        """Take the score of the first `covers` characters; None: of all that was handed to the reader."""
        covers = self._fed if covers is None else covers
        self._score = score
        self._final = self.closed and covers == len(self.text)
        # NaN fails the comparison
        if score >= self.prefix_threshold:
            self.harmful = False
            self.cleared = max(self.cleared, covers)
        else:
            self.harmful = True
        low = self.screen.stop_below
        if covers != self._judged:  # after a preemption the same beginning is judged again
            self._low = self._low + 1 if low is not None and not score >= low else 0
        self._judged = covers

    def fail(self, error: Exception) -> None:
        """No score will come: whatever the reason, the text counts as harmful."""
        if isinstance(error, PassTimeout):
            self.error = "timeout"
        elif isinstance(error, TooLong):
            self.error = "too_long"
        else:
            self.error = str(error) or type(error).__name__
        self.harmful = True
