"""The one loop of every guard: answer, judge, mend, judge again.

No model runs here, and nothing here knows the engine: `guarded` yields passes and gets their results. It fails
closed: whatever goes wrong in a detector or a remedy ends in the refusal, with the reason.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from ..chat import Chat
from ..errors import Aborted, InvalidGuard, PassError
from ..passes import Answer, Ask, Decision, Generate, Handle, Judged, Loop, Release, ReleaseMode, Screen, Start
from ..request import FinishReason, Outcome, Verdict
from ..text import Untrusted
from .detectors import MLLM, NONSENSE, Detector, Judging, is_sound, reason_of, screen_of
from .remedies import Mending, Prefilling, Starting
from .watch import Watch

if TYPE_CHECKING:
    from .guard import Guard, Released

_RELEASES: dict[ReleaseMode, Release] = {"verdict": "hold", "window": "window", "audit": "audit"}


def guarded(chat: Chat, guard: Guard, release: ReleaseMode = "verdict") -> Loop:
    """The loop. Yields passes and returns a `Decision`, whose k-th verdict is about the k-th pass that ran with
    the label `answer`, `rewrite` or `eyes_closed`.

    A `PassError` at the first answer goes up to the caller, and so does `Aborted` at any pass; every other
    failure ends in a refusal. Under "audit" nothing is mended or refused. What a loop has started it waits for or
    cancels before it ends, unless it is closed from outside. Raises `InvalidGuard`, before any pass, for a release
    that the guard cannot do.
    """
    if release not in get_args(ReleaseMode):
        raise InvalidGuard(f"release must be one of {', '.join(get_args(ReleaseMode))}, not {release!r}")
    detector = guard.detector
    if detector is None:
        return _unguarded(chat, guard)
    if release != "verdict" and guard.published:
        raise InvalidGuard(
            f"guard {guard.name!r} is a released script, which shows its text at the end: no {release!r}"
        )
    screen = later = None
    if not guard.published:
        screen = screen_of(detector, chat)
        later = screen_of(detector, _seen(guard, chat)) if guard.recheck else None
    if release == "window" and screen is None:
        raise InvalidGuard(f"release='window' needs a detector that reads along; {detector.name!r} does not")
    watch = Watch(later)
    if release == "audit":
        return watch.over(_audited(chat, guard, detector, screen))
    return watch.over(_guarded(chat, guard, detector, _RELEASES[release], screen, watch))


def _unguarded(chat: Chat, guard: Guard) -> Loop:
    if guard.released is not None:
        answer = yield from _released_answer(chat, guard.released)
    else:
        answer = yield Generate(MLLM, chat, release="live")
    return Decision(answer, Outcome.UNGUARDED)


def _audited(chat: Chat, guard: Guard, detector: Detector, screen: Screen | None) -> Loop:
    # the whole answer is shown, so that nothing stops it
    screen = None if screen is None else replace(screen, stop_below=None)
    answer = yield Generate(MLLM, chat, release="audit", screen=screen)
    verdict = yield from _judge(guard, detector, chat, answer)
    judged = (Judged(answer.text, verdict),)
    if verdict.harmless:
        return Decision(answer, Outcome.CLEAN, judged)
    return Decision(answer, Outcome.FLAGGED, judged, verdict.reason)


def _guarded(
    chat: Chat, guard: Guard, detector: Detector, release: Release, screen: Screen | None, watch: Watch
) -> Loop:
    answer = yield from _first_answer(chat, guard, release, screen)
    judged: list[Judged] = []
    for round in range(guard.max_rounds + 1):
        if round and not guard.recheck:
            return Decision(answer, Outcome.MENDED, tuple(judged))
        started = None
        if guard.speculate and round < guard.max_rounds and answer.screened is None:
            started = yield from _start(guard, chat)
        verdict = yield from _judge(guard, detector, _seen(guard, chat) if round else chat, answer)
        judged.append(Judged(answer.text, verdict))
        if verdict.harmless:
            return Decision(answer, Outcome.MENDED if round else Outcome.CLEAN, tuple(judged))
        if verdict.error is not None or round == guard.max_rounds:
            break
        try:
            answer = watch.vouched((yield from _mend(guard, chat, answer, started)))
        except Aborted:
            raise
        except Exception as error:
            return _refused(guard.refusal, judged, f"{guard.remedy.name}: {reason_of(error)}")
        if answer.finish_reason == FinishReason.REFUSED:
            return _refused(answer.text, judged, verdict.reason)
    return _refused(guard.refusal, judged, verdict.reason)


def _first_answer(chat: Chat, guard: Guard, release: Release, screen: Screen | None) -> Generator[Ask, Any, Answer]:
    if guard.released is not None:
        return (yield from _released_answer(chat, guard.released))
    remedy, ahead = guard.remedy, None
    if guard.speculate and screen is not None and guard.max_rounds and isinstance(remedy, Prefilling):
        ahead = remedy.ahead(chat)
    return (yield Generate(MLLM, chat, release=release, screen=screen, ahead=ahead))


def _released_answer(chat: Chat, script: Released) -> Generator[Ask, Any, Answer]:
    prompt = script.conversation((Untrusted(chat.query),), chat.images)
    answer = yield Generate(MLLM, prompt, sampling=script.sampling)
    return answer._replace(text=script.tidy(answer.text))


def _seen(guard: Guard, chat: Chat) -> Chat:
    """The chat as it is before whoever judges what the remedy made of it."""
    return chat if guard.remedy.keeps_images else chat.without_images()


def _start(guard: Guard, chat: Chat) -> Generator[Ask, Any, Handle | None]:
    """The remedy's first pass, begun before the verdict; None where it cannot be, which is no failure yet."""
    if not isinstance(guard.remedy, Starting):
        return None
    try:
        first = guard.remedy.start(chat)
        handle = None if first is None else (yield Start(first))
    except Aborted:
        raise
    except Exception:
        return None
    return handle if isinstance(handle, Handle) else None


def _judge(guard: Guard, detector: Detector, chat: Chat, answer: Answer) -> Judging:
    """The detector's verdict, or a harmful one that says why there is none."""
    try:
        verdict = yield from detector.judge(chat, answer)
        if not is_sound(verdict):
            return Verdict.failed(detector.name, NONSENSE)
        if answer.stopped_early and verdict.harmless:  # a beginning is no answer
            failed = answer.screened and answer.screened.error
            return Verdict.failed(detector.name, failed or "stopped early, but not harmful", verdict.threshold)
        if guard.released is not None:
            detail = f"{verdict.detail}; {guard.released.note}" if verdict.detail else guard.released.note
            verdict = replace(verdict, detail=detail)
        return verdict
    except Aborted:
        raise
    except Exception as error:
        return Verdict.failed(detector.name, reason_of(error))


def _mend(guard: Guard, chat: Chat, answer: Answer, started: Handle | None) -> Mending:
    """The remedy's answer. Raises `PassError` if it is none, or has no text and the guard is not published."""
    if started is not None and isinstance(guard.remedy, Starting):
        mended = yield from guard.remedy.mend(chat, answer, started)
    else:
        mended = yield from guard.remedy.mend(chat, answer)
    if not isinstance(mended, Answer) or not isinstance(mended.text, str):
        raise PassError(NONSENSE)
    if not mended.text.strip() and not guard.published:
        raise PassError("empty")
    return mended


def _refused(text: str, judged: list[Judged], reason: str) -> Decision:
    answer = Answer(text, finish_reason=FinishReason.REFUSED)
    return Decision(answer, Outcome.REFUSED, tuple(judged), reason)
