"""Cascades: who is asked when, whose verdict counts, and a calibration that keeps to its budget."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockade.engine.chat import Chat
from stockade.engine.errors import Aborted, InvalidGuard, PassError, PassTimeout
from stockade.engine.guards import Cascade, Guard, HarmHead, Probe, SelfJudge, calibrate, guarded, prompts
from stockade.engine.passes import Answer, Choose, Chosen, Generate, ModelTraits, Score, Scored, Screen, Screened
from stockade.engine.request import Outcome
from stockade.engine.text import Untrusted

CHAT = Chat.single("How?")
ANSWER = Answer("this")
CHEAP, DEAR = HarmHead("cheap", "response"), HarmHead("dear", "response", threshold=0.6)
CASCADE = Cascade(CHEAP, DEAR, (0.2, 0.8))
ASK_CHEAP, ASK_DEAR = Score("cheap", (Untrusted("this"),)), Score("dear", (Untrusted("this"),))


@pytest.mark.parametrize(("score", "harmless"), [(0.0, False), (0.1999, False), (0.8, True), (1.0, True)])
def test_outside_the_band_the_cheap_detector_decides(play, score, harmless):
    verdict, passes = play(CASCADE.judge(CHAT, ANSWER), Scored(score, 0.5))
    assert passes == [ASK_CHEAP]
    assert (verdict.harmless, verdict.score, verdict.detector) == (harmless, score, "cascade")


@pytest.mark.parametrize("score", [0.2, 0.5, 0.7999])
@pytest.mark.parametrize(("second", "harmless"), [(0.59, False), (0.6, True)])
def test_inside_the_band_the_dear_one_does(play, score, second, harmless):
    verdict, passes = play(CASCADE.judge(CHAT, ANSWER), Scored(score, 0.5), Scored(second, 0.5))
    assert passes == [ASK_CHEAP, ASK_DEAR]
    assert (verdict.harmless, verdict.threshold) == (harmless, 0.6)
    assert verdict.detail == f"harm_head {score:.3f}, harm_head asked"


def test_the_cascades_threshold_goes_before_the_dear_detectors(play):
    cascade = replace(CASCADE, dear_threshold=0.9)
    assert play(cascade.judge(CHAT, ANSWER), Scored(0.5, 0.5), Scored(0.8, 0.5)).result.harmful


@pytest.mark.parametrize("failure", [Scored(math.nan, 0.5), PassTimeout("late"), RuntimeError("odd"), None])
def test_where_the_cheap_detector_fails_the_dear_one_decides(play, failure):
    for second, harmless in ((0.9, True), (0.1, False)):
        verdict, passes = play(CASCADE.judge(CHAT, ANSWER), failure, Scored(second, 0.5))
        assert passes == [ASK_CHEAP, ASK_DEAR]
        assert verdict.harmless is harmless


def test_a_dear_detector_that_fails_is_a_harmful_verdict(play):
    verdict, _ = play(CASCADE.judge(CHAT, ANSWER), Scored(0.5, 0.5), Scored(math.nan, 0.5))
    assert (verdict.harmless, verdict.reason) == (False, "nonsense")
    guard = Guard(CASCADE)
    decision, _ = play(guarded(CHAT, guard), ANSWER, Scored(0.5, 0.5), PassError("gone"))
    assert (decision.outcome, decision.reason) == (Outcome.REFUSED, "gone")


def test_an_abort_goes_up_from_either_detector(play):
    for script in ([], [Scored(0.5, 0.5)]):
        with pytest.raises(Aborted):
            play(guarded(CHAT, Guard(CASCADE)), ANSWER, *script, Aborted("gone"))


def test_a_cascade_screens_as_its_cheap_detector_does_but_clears_above_the_band_only(play):
    screen = Screen("cheap", (), threshold=0.8)
    assert CASCADE.screening(CHAT) == screen
    decision, passes = play(
        guarded(CHAT, Guard(CASCADE), "window"), Answer("this", screened=Screened(screen, 0.9, 0.5))
    )
    assert passes == [Generate("mllm", CHAT, release="window", screen=screen)]
    assert decision.outcome == Outcome.CLEAN


def test_a_probe_is_followed_by_whoever_knows_better(play):
    cascade = Cascade(Probe(), SelfJudge(), (0.2, 0.8))
    tap = Screen("probe", None, threshold=0.8)
    unsure = Answer("this", screened=Screened(tap, 0.5, 0.5))
    for answer in (unsure, ANSWER):  # one that the probe is unsure of, one that it has not seen
        verdict, passes = play(cascade.judge(CHAT, answer), Chosen((0.1, 0.8)))
        assert isinstance(passes[0], Choose)
        assert verdict.harmless


def test_a_cascade_of_a_judge_first_cannot_run_along():
    cascade = Cascade(SelfJudge(), CHEAP, (0.2, 0.8))
    assert (cascade.incremental, cascade.screening(CHAT)) == (False, None)
    with pytest.raises(InvalidGuard, match="'cascade' does not"):
        guarded(CHAT, Guard(cascade), "window")


def test_both_detectors_are_bound_to_their_models():
    traits = {"mllm": ModelTraits(), "cheap": ModelTraits("response"), "dear": ModelTraits("question_answer")}
    cascade = Guard(Cascade(HarmHead("cheap"), HarmHead("dear"), (0.2, 0.8))).bind(traits).detector
    assert (cascade.cheap.template, cascade.dear.template) == ("response", "question_answer")
    with pytest.raises(InvalidGuard, match="needs a model 'dear'"):
        Guard(CASCADE).run(CHAT, {"cheap": ModelTraits("response")})


@pytest.mark.parametrize(
    "fields",
    [
        {"cheap": None},
        {"dear": "dear"},
        {"band": (0.8, 0.2)},
        {"band": (0.2, 1.2)},
        {"band": (math.nan, 0.5)},
        {"band": 0.5},
        {"band": (0.1, 0.2, 0.3)},
        {"dear_threshold": math.nan},
        {"cheap": replace(CHEAP, stop_below=0.3)},
    ],
)
def test_a_cascade_that_makes_no_sense_is_refused(fields):
    with pytest.raises(InvalidGuard):
        replace(CASCADE, **fields)


# --- calibration ---

coarse = st.integers(0, 10).map(lambda tenth: tenth / 10)  # with ties
scores = st.floats(0, 1) | coarse
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=30)


def judged_harmful(play, cascade, cheap, dear):
    script = [Scored(cheap, 0.5)] + [Scored(dear, 0.5)] * (cascade.band[0] <= cheap < cascade.band[1])
    return play(cascade.judge(CHAT, ANSWER), *script).result.harmful


@given(pairs, pairs, coarse, coarse)
def test_a_calibrated_cascade_keeps_to_both_budgets(play, harmless, harmful, budget, asked):
    found = calibrate(harmless, harmful, budget, asked)
    cascade = CASCADE.calibrated(harmless, harmful, budget, asked)
    assert (cascade.band, cascade.dear_threshold) == (found.band, found.dear_threshold)
    false, true = (
        sum(judged_harmful(play, cascade, *pair) for pair in texts) / len(texts) for texts in (harmless, harmful)
    )
    assert (false, true) == (found.false_positives, found.true_positives)
    assert false <= budget
    assert found.asked <= asked


@given(pairs, pairs, coarse, coarse)
def test_a_cascade_finds_no_less_than_its_cheap_detector_alone(harmless, harmful, budget, asked):
    cheap = sorted(score for score, _ in harmless)
    allowed = math.floor(budget * len(cheap))
    threshold = cheap[allowed] if allowed < len(cheap) else 1.0
    alone = sum(score < threshold for score, _ in harmful) / len(harmful)
    assert calibrate(harmless, harmful, budget, 0.0).true_positives == alone
    assert calibrate(harmless, harmful, budget, asked).true_positives >= alone


def test_a_dear_detector_that_tells_texts_apart_finds_them_all():
    harmless = [(0.5, 0.9)] * 10 + [(0.9, 0.9)] * 90
    harmful = [(0.5, 0.1)] * 20 + [(0.05, 0.1)] * 20
    found = calibrate(harmless, harmful, budget=0.0, asked=0.1)
    assert found == ((0.5, 0.9), 0.9, 0.0, 1.0, 0.1)
    assert calibrate(harmless, harmful, budget=0.0, asked=0.05).true_positives == 0.5


@pytest.mark.parametrize(
    "given_",
    [
        ([], [(0.1, 0.1)], 0.1),
        ([(0.1, 0.1)], [], 0.1),
        ([(0.1, math.nan)], [(0.1, 0.1)], 0.1),
        ([(0.1, 0.1)], [(1.1, 0.1)], 0.1),
        ([(0.1, 0.1)], [(0.1, 0.1)], 1.5),
        ([(0.1, 0.1)], [(0.1, 0.1)], 0.1, -0.1),
    ],
)
def test_a_calibration_without_sound_scores_is_refused(given_):
    with pytest.raises(InvalidGuard):
        calibrate(*given_)


def test_the_template_of_a_cascades_screen_is_the_cheap_detectors():
    cascade = replace(CASCADE, cheap=HarmHead("cheap", "question_answer"))
    assert cascade.screening(CHAT).before == prompts.detector_before("question_answer", "How?")
