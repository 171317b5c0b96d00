"""What leaves when: no character before what a release asks for, whatever the detector says, does or suffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.engine.engine import Engine
from stockade.engine.guards import Detoxify, Guard, HarmHead, Probe, Refuse
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import ReleaseMode
from stockade.engine.request import Outcome, Replaced, Reply
from stockade.engine.runner import StepResult
from stockade.engine.sampling import SamplingParams
from stockade.engine.scheduler import Lane, Work
from stockade.engine.sequence import Sequence
from stockade.engine.text import Untrusted
from tests.engine.screened import assert_empty, between, engine_of, force, probe_on, with_models

LONG = SamplingParams(max_tokens=60, ignore_eos=True)
RELEASES: tuple[ReleaseMode, ...] = ("verdict", "window", "audit")


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    found = load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )
    return with_models(found, probe=probe_on(found.models["mllm"]))


def prose(engine: Engine) -> list[int]:
    """As many tokens of words as `LONG` takes."""
    text = "so it goes, on and on; what is it that we do? " * 5
    return engine.models["mllm"].codec.encode((Untrusted(text),), add_special_tokens=False)[: LONG.max_tokens]


@pytest.fixture
def plain(models: ModelSet) -> str:
    """The answer of `shown`."""
    engine = engine_of(models)
    return engine.models["mllm"].codec.decode(prose(engine))


def head_guard(chunk: int | None = 4, remedy: Any = None, **more: Any) -> Guard:
    return Guard(HarmHead(template="response", chunk=chunk, **more), remedy or Refuse())


def probe_guard(chunk: int | None = 4, **more: Any) -> Guard:
    return Guard(Probe(chunk=chunk, **more), Refuse())


class Shown(NamedTuple):
    """A stream to its end: its pieces, how it was replaced, and of each piece what was clear when it left."""

    pieces: list[str]
    replaced: Replaced | None
    reply: Reply
    clear: list[int]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Verdicts:
    """Scores of a detector by the number of tokens that it has read, and what of the answer each score is about."""

    def __init__(self, engine: Engine, score: Callable[[int], float]) -> None:
        self.clear = 0  # characters of the longest beginning found harmless
        self.read = 0  # scores given
        self._engine = engine
        self._score = score
        between(engine, self._scripted)

    def _scripted(self, run: Any, lane: Lane, works: list[Work]) -> StepResult:
        result = run(lane, works)
        scores = [(sequence, self._of(sequence)) for sequence, _ in result.scores]
        return replace(result, scores=scores)

    def _of(self, sequence: Sequence) -> float:
        tokens = sequence.tokens[1:]  # behind BOS; what a score is about is read off the detector's own tokens
        score = self._score(len(tokens))
        self.read += 1
        if score >= 0.5:
            self.clear = max(self.clear, len(sequence.model.codec.decode(tokens)))
        return score


def shown(engine: Engine, verdicts: Verdicts | None = None, words: bool = True, **options: Any) -> Shown:
    """A stream of one answer, step by step; words: made of them, and not what random weights say."""
    if words:
        force(engine, dict.fromkeys(range(9), prose(engine)))
    request = engine.submit("Tell me", streaming=True, **{"sampling": LONG, **options})
    pieces: list[str] = []
    clear: list[int] = []
    replaced = None
    while request.reply is None:
        engine.step()
        engine.check_integrity()
        for item in request.take():
            assert replaced is None  # it is the last thing
            if isinstance(item, Replaced):
                replaced = item
            else:
                pieces.append(item)
                clear.append(verdicts.clear if verdicts else -1)
    assert all(pieces)
    assert_empty(engine)
    return Shown(pieces, replaced, request.reply, clear)


def consistent(found: Shown, engine: Engine, release: ReleaseMode) -> None:
    """What holds for every stream: its end is the reply, and what was shown unscreened is counted."""
    if found.replaced is None:
        assert found.text == found.reply.text
    else:
        assert found.replaced.text == found.reply.text
        assert found.replaced.released == found.text and found.text
        assert found.replaced.reason
        assert release == "window"
    if release != "audit":
        assert engine.driver.unscreened_characters == found.reply.trace.unscreened_characters == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    verdicts=st.lists(st.sampled_from([0.9, 0.9, 0.1, float("nan")]), min_size=1, max_size=12),
    chunk=st.sampled_from([1, 3, 8, None]),
    seed=st.integers(0, 20),
    stop=st.sampled_from([(), ("e",), ("ab", "th")]),
    pages=st.sampled_from([None, 12]),
    words=st.booleans(),
)
def test_in_a_window_no_character_leaves_before_a_harmless_beginning_covers_it(
    models: ModelSet,
    verdicts: list[float],
    chunk: int | None,
    seed: int,
    stop: tuple[str, ...],
    pages: int | None,
    words: bool,
) -> None:
    engine = engine_of(models, pages, max_sequences=8)
    said = Verdicts(engine, lambda tokens: verdicts[min(tokens // 7, len(verdicts) - 1)])
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=60, stop=stop)
    found = shown(engine, said, words, guard=head_guard(chunk), sampling=params, release="window")
    consistent(found, engine, "window")
    shown_of_answer = found.reply.outcome is Outcome.CLEAN or found.replaced is not None
    for number, clear in enumerate(found.clear if shown_of_answer else ()):
        assert len("".join(found.pieces[: number + 1])) <= clear
    if found.reply.outcome is Outcome.REFUSED and found.replaced is None:
        assert found.pieces == [Guard().refusal]


def test_a_harmless_answer_leaves_in_pieces_and_whole(models: ModelSet, plain: str) -> None:
    engine = engine_of(models)
    said = Verdicts(engine, lambda tokens: 0.9)
    found = shown(engine, said, guard=head_guard(), release="window")
    consistent(found, engine, "window")
    assert len(found.pieces) > 5 and found.reply.outcome is Outcome.CLEAN
    assert found.text == plain
    assert said.read > 5


def test_what_left_of_a_harmful_answer_is_told(models: ModelSet) -> None:
    engine = engine_of(models)
    said = Verdicts(engine, lambda tokens: 0.9 if tokens < 20 else 0.1)
    found = shown(engine, said, guard=head_guard(), release="window")
    consistent(found, engine, "window")
    assert found.replaced is not None and found.replaced.reason == "harmful: 0.100 against 0.500"
    assert found.reply.outcome is Outcome.REFUSED
    whole = found.reply.passes[0].text
    assert whole.startswith(found.text) and 0 < len(found.text) < len(whole)


def test_what_takes_a_harmful_answers_place_was_judged_too(models: ModelSet) -> None:
    engine = engine_of(models)
    rounds: list[int] = []

    def score(tokens: int) -> float:
        rounds.append(tokens)
        again = any(later < earlier for earlier, later in pairwise(rounds))
        return 0.9 if again or tokens < 20 else 0.1

    Verdicts(engine, score)
    found = shown(engine, guard=head_guard(remedy=Detoxify()), release="window")
    consistent(found, engine, "window")
    assert found.replaced is not None and found.reply.outcome is Outcome.MENDED
    assert found.reply.text == [record for record in found.reply.passes if record.label == "rewrite"][-1].text
    assert [verdict.harmless for verdict in found.reply.verdicts] == [False, True]


def test_a_verdict_release_shows_nothing_early(models: ModelSet) -> None:
    for score, outcome in ((0.9, Outcome.CLEAN), (0.1, Outcome.REFUSED)):
        engine = engine_of(models)
        Verdicts(engine, lambda tokens, score=score: score)  # type: ignore[misc]
        found = shown(engine, guard=head_guard())
        consistent(found, engine, "verdict")
        assert (len(found.pieces), found.reply.outcome) == (1, outcome)


@pytest.mark.parametrize("guard", [head_guard(), Guard(HarmHead(template="response", screen=False), Refuse())])
def test_an_audit_shows_everything_at_once_and_records_the_verdict(
    models: ModelSet, plain: str, guard: Guard
) -> None:
    for score, outcome in ((0.9, Outcome.CLEAN), (0.1, Outcome.FLAGGED)):
        engine = engine_of(models)
        said = Verdicts(engine, lambda tokens, score=score: score)  # type: ignore[misc]
        found = shown(engine, said, guard=guard, release="audit")
        consistent(found, engine, "audit")
        assert found.text == plain and len(found.pieces) > 20 and found.reply.outcome is outcome
        assert [verdict.score for verdict in found.reply.verdicts] == [score]
        count = found.reply.trace.unscreened_characters
        assert engine.driver.unscreened_characters == count > 0
        if outcome is Outcome.FLAGGED or guard.detector is None or not guard.detector.incremental:
            assert count == len(plain)
        else:
            assert count < len(plain) + 1


def test_a_taps_window(models: ModelSet, plain: str) -> None:
    engine = engine_of(models)
    asked: list[int] = []
    scripted = [0.9]
    tapped = engine.runner.tapped_score

    def score(lane: Lane, sequence: Sequence) -> float:
        assert tapped(lane, sequence) == pytest.approx(0.5, abs=0.5)
        asked.append(len(sequence.tokens))
        return scripted[0] if len(asked) < 5 else scripted[-1]

    engine.runner.tapped_score = score  # type: ignore[method-assign]
    found = shown(engine, guard=probe_guard(), release="window")
    consistent(found, engine, "window")
    assert found.text == plain and len(found.pieces) > 5 and len(asked) > 5
    asked.clear()
    scripted.append(0.1)
    found = shown(engine, guard=probe_guard(), release="window")
    consistent(found, engine, "window")
    assert found.replaced is not None and plain.startswith(found.text)
    # four scores were good: of 4, 8, 12 and 16 tokens, of which the last was no input yet
    codec = engine.models["mllm"].codec
    assert found.text == codec.decode(found.reply.passes[0].token_ids[:15]).rstrip("\ufffd")


# --- detectors that fail ---


def crash(engine: Engine, after: int) -> None:
    """The detector's lane fails from its batch with this number on."""
    ran = iter(range(10_000))

    def crashing(run: Any, lane: Lane, works: list[Work]) -> StepResult:
        if lane.name == "detector" and next(ran) >= after:
            raise RuntimeError("out of memory")
        return run(lane, works)

    between(engine, crashing)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("release", RELEASES)
def test_a_detector_that_crashes_closes_the_stream(
    models: ModelSet, plain: str, release: ReleaseMode, after: int
) -> None:
    engine = engine_of(models)
    Verdicts(engine, lambda tokens: 0.9)
    crash(engine, after)
    guard = head_guard()
    found = shown(engine, guard=guard, release=release)
    consistent(found, engine, release)
    assert found.reply.error == "RuntimeError: out of memory"
    if release == "audit":
        assert (found.text, found.reply.outcome) == (plain, Outcome.FLAGGED)
    else:
        assert (found.reply.text, found.reply.outcome) == (guard.refusal, Outcome.REFUSED)
        assert (found.replaced is not None) == (release == "window" and after > 0)
        assert len(found.reply.passes[0].token_ids) < LONG.max_tokens  # type: ignore[operator]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", ["nan head", "nan probe", "timeout"])
def test_a_detector_that_says_nothing_closes_the_stream(models: ModelSet, release: ReleaseMode, kind: str) -> None:
    broken = dict(models.models)
    for name in ("detector", "probe"):
        head = broken[name].head
        assert head is not None
        if kind != "timeout":
            broken[name] = replace(
                broken[name], head=replace(head, weight=torch.full_like(head.weight, float("nan")))
            )
    engine = engine_of(ModelSet(broken, models.device, models.dtype))
    guard = probe_guard(threshold=0.0) if kind == "nan probe" else head_guard(threshold=0.0)
    if kind == "timeout":
        guard = head_guard(threshold=0.0, timeout=1e-9)
    found = shown(engine, guard=guard, release=release)
    consistent(found, engine, release)
    assert found.reply.error == ("timeout" if kind == "timeout" else "nonsense")
    if release == "audit":
        assert found.reply.outcome is Outcome.FLAGGED and found.text == found.reply.passes[0].text
    else:
        assert (found.reply.text, found.reply.outcome) == (guard.refusal, Outcome.REFUSED)
        assert (found.replaced is not None) == (kind == "timeout" and release == "window")


# --- answers that are stopped ---


@pytest.mark.parametrize("make", [head_guard, probe_guard])
@pytest.mark.parametrize("release", ["verdict", "window"])
def test_a_clearly_harmful_answer_is_stopped(
    models: ModelSet, make: Callable[..., Guard], release: ReleaseMode
) -> None:
    counts = []
    for patience in (1, 2, 4):
        engine = engine_of(models)
        guard = make(threshold=1.0, stop_below=1.0, patience=patience)
        found = shown(engine, guard=guard, release=release)
        consistent(found, engine, release)
        assert (found.reply.text, found.reply.outcome) == (guard.refusal, Outcome.REFUSED)
        counts.append(len(found.reply.passes[0].token_ids))
    assert counts == sorted(set(counts)) and counts[-1] < 40
    engine = engine_of(models)
    found = shown(engine, guard=make(threshold=1.0, stop_below=0.0), release=release)
    assert len(found.reply.passes[0].token_ids) == 60 and found.reply.outcome is Outcome.REFUSED


def test_a_preempted_screen_does_not_stop_an_answer_sooner(models: ModelSet) -> None:
    counts = []
    for preempt in (False, True):
        engine = engine_of(models)
        guard = head_guard(threshold=1.0, stop_below=1.0, patience=3)
        request = engine.submit("Tell me", guard=guard, sampling=LONG)
        while request.reply is None:
            engine.step()
            for sequence in list(engine.scheduler.sequences()):
                if preempt and sequence.open and sequence.running and not sequence.remaining:
                    engine.scheduler._preempt(sequence)
        counts.append(len(request.reply.passes[0].token_ids))
    # one more step may pass before a screen that computes again is idle
    assert counts[0] <= counts[1]


def test_an_audit_stops_nothing(models: ModelSet) -> None:
    engine = engine_of(models)
    found = shown(engine, guard=head_guard(threshold=1.0, stop_below=1.0, patience=1), release="audit")
    assert len(found.reply.passes[0].token_ids) == 60 and found.reply.outcome is Outcome.FLAGGED


def test_streams_beside_each_other_are_those_alone(models: ModelSet) -> None:
    questions = ["One", "Two, please", "Three of them"]
    alone = []
    for question in questions:
        stream = engine_of(models).stream(question, guard=head_guard(threshold=0.0), sampling=LONG, release="window")
        alone.append("".join(str(piece) for piece in stream))
    engine = engine_of(models, 20, max_sequences=8)
    modes: tuple[ReleaseMode, ...] = ("window", "audit", "verdict")
    guard = head_guard(threshold=0.0)
    requests = [
        engine.submit(question, guard=guard, sampling=LONG, streaming=True, release=mode)
        for question, mode in zip(questions, modes, strict=True)
    ]
    texts = [""] * 3
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        for number, request in enumerate(requests):
            texts[number] += "".join(str(item) for item in request.take())
    assert texts == alone
