"""Loops that a server needs besides a guard's own: raw prompts under a guard, and a verdict on a text by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..chat import Chat
from ..errors import Aborted, PassError
from ..guards import Detector
from ..guards.detectors import reason_of
from ..passes import Answer, Ask, Decision, Generate, Judged, Loop
from ..request import Outcome, Verdict


def continued(prompt: tuple[int, ...], loop: Loop) -> Loop:
    """A guard's loop whose first answer continues a raw prompt; the guard takes its text for the question."""
    return _from_first(loop, lambda ask: replace(ask, prompt=prompt))


def given(text: str, loop: Loop) -> Loop:
    """A guard's loop whose first answer is there already, from a model elsewhere."""
    return _from_first(loop, lambda _: loop.send(Answer(text)))


def _from_first(loop: Loop, answer: Callable[[Generate], Ask]) -> Loop:
    """A guard's loop in which `answer` says what is asked for in place of its first answer."""
    try:
        ask = next(loop)
        if isinstance(ask, Generate):
            ask = answer(ask)
        while True:
            try:
                result = yield ask
            except PassError as error:
                ask = loop.throw(error)
            else:
                ask = loop.send(result)
    except StopIteration as stop:
        return stop.value
    finally:
        loop.close()


def moderated(text: str, detector: Detector) -> Loop:
    """The detector's verdict on a text that answers nothing; a detector that fails has found it harmful."""
    try:
        verdict = yield from detector.judge(Chat.single(""), Answer(text))
    except Aborted:
        raise
    except Exception as error:
        verdict = Verdict.failed(detector.name, reason_of(error))
    outcome = Outcome.CLEAN if verdict.harmless else Outcome.FLAGGED
    return Decision(Answer(""), outcome, (Judged(text, verdict),), verdict.reason)
