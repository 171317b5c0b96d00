"""Detectors alone: what they ask for, and that nothing but a sound result is a harmless verdict."""

import math

import pytest
from PIL import Image

from stockade.engine.chat import Chat
from stockade.engine.errors import InvalidGuard
from stockade.engine.guards import HarmHead, SelfJudge, prompts
from stockade.engine.images import load_image
from stockade.engine.passes import Answer, Choose, Chosen, Generate, Score, Scored
from stockade.engine.text import segments_text

CHAT = Chat.single("How?")
ANSWER = Answer("Like this.")
NO_SCORE = [math.nan, math.inf, -math.inf, -0.01, 1.01, None, "0.9", True]


def test_a_harm_head_reads_the_answer_in_its_template(play):
    for template in prompts.DETECTOR_TEMPLATES:
        head = HarmHead("d", template, timeout=2.0)
        text = prompts.detector_text(template, "How?", "Like this.")
        verdict, passes = play(head.judge(CHAT, ANSWER), Scored(0.7, 0.6))
        assert passes == [Score("d", text.segments, text.pool_from, timeout=2.0)]
        assert (verdict.score, verdict.threshold, verdict.harmless) == (0.7, 0.6, True)


@pytest.mark.parametrize(("score", "harmless"), [(0.6, True), (0.5999, False), (0.0, False), (1.0, True)])
def test_a_score_at_the_threshold_is_harmless(play, score, harmless):
    verdict, _ = play(HarmHead(template="response").judge(CHAT, ANSWER), Scored(score, 0.6))
    assert verdict.harmless is harmless
    assert verdict.error is None


def test_a_guards_threshold_goes_before_the_heads_own(play):
    verdict, _ = play(HarmHead(template="response", threshold=0.9).judge(CHAT, ANSWER), Scored(0.7, 0.5))
    assert verdict.harmful
    assert verdict.threshold == 0.9


@pytest.mark.parametrize("value", NO_SCORE)
def test_a_score_that_is_no_probability_is_nonsense(play, value):
    verdict, _ = play(HarmHead(template="response").judge(CHAT, ANSWER), Scored(value, 0.5))
    assert verdict.harmful
    assert verdict.reason == "nonsense"


@pytest.mark.parametrize("value", NO_SCORE)
def test_a_heads_own_threshold_that_is_no_probability_is_nonsense(play, value):
    verdict, _ = play(HarmHead(template="response").judge(CHAT, ANSWER), Scored(0.9, value))
    assert verdict.harmful
    assert verdict.reason == "nonsense"


def test_a_head_without_a_template_says_so(play):
    with pytest.raises(InvalidGuard, match="template"):
        play(HarmHead().judge(CHAT, ANSWER))


def test_the_self_judge_compares_no_with_yes(play):
    verdict, passes = play(SelfJudge(timeout=3.0).judge(CHAT, ANSWER), Chosen((0.1, 0.3)))
    text = segments_text(prompts.judge("How?", "Like this."))
    assert passes == [Choose("mllm", Chat.single(text), ("yes", "no"), timeout=3.0)]
    assert verdict.score == pytest.approx(0.75)
    assert verdict.harmless
    assert play(SelfJudge().judge(CHAT, ANSWER), Chosen((0.3, 0.1))).result.harmful


def test_the_self_judge_sees_the_images_unless_told_otherwise(play):
    chat = Chat.single("How?", (load_image(Image.new("RGB", (4, 4))),))
    for judge, images in ((SelfJudge(), chat.images), (SelfJudge(with_image=False), ())):
        _, passes = play(judge.judge(chat, ANSWER), Chosen((0.1, 0.3)))
        assert passes[0].prompt.images == images
    assert len(chat.images) == 1


@pytest.mark.parametrize(
    "masses",
    [(0.0, 0.0), (0.0, 0.0999), (math.nan, 0.5), (0.1, math.nan), (0.1, math.inf), (-0.1, 0.9), (0.6, 0.9)],
)
def test_masses_that_answer_nothing_are_nonsense(play, masses):
    verdict, _ = play(SelfJudge().judge(CHAT, ANSWER), Chosen(masses))
    assert verdict.harmful
    assert verdict.reason == "nonsense"


@pytest.mark.parametrize(
    ("said", "score", "error"),
    [
        ("no", 1.0, None),
        (" No.\n", 1.0, None),
        ("yes", 0.0, None),
        ("YES.", 0.0, None),
        ("No, it is fine.", None, "nonsense"),
        ("not harmful", None, "nonsense"),
        ("", None, "nonsense"),
        ("no..", None, "nonsense"),
        ("yes no", None, "nonsense"),
    ],
)
def test_the_judges_text_is_read_strictly(play, said, score, error):
    verdict, passes = play(SelfJudge(mode="text").judge(CHAT, ANSWER), Answer(said))
    assert isinstance(passes[0], Generate)
    assert passes[0].label == "judge"
    assert verdict.harmless is (score == 1.0)
    assert verdict.error == error
    if error is None:
        assert verdict.score == score


def test_a_plain_judge_reads_the_whole_answer_and_the_published_one_its_beginning(play):
    long = Answer("a" * 1927 + "b" * 100)
    _, plain = play(SelfJudge(mode="text").judge(CHAT, long), Answer("no"))
    _, published = play(SelfJudge(mode="published").judge(CHAT, long), Answer("no"))
    assert plain[0].prompt == Chat.single(segments_text(prompts.judge("How?", long.text)))
    assert published[0].prompt == prompts.vicuna_v1(prompts.judge("How?", "a" * 1927))


def test_the_published_judge_fails_open_and_says_so(play):
    verdict, _ = play(SelfJudge(mode="published").judge(CHAT, ANSWER), Answer("Yes, it is"))
    assert verdict.harmless
    assert verdict.detail is not None
    assert "published rule" in verdict.detail


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (HarmHead, {"template": "other"}),
        (HarmHead, {"threshold": math.nan}),
        (HarmHead, {"threshold": "0.5"}),
        (HarmHead, {"timeout": 0.0}),
        (HarmHead, {"timeout": math.nan}),
        (SelfJudge, {"mode": "maybe"}),
        (SelfJudge, {"min_mass": 0.0}),
        (SelfJudge, {"min_mass": 1.5}),
        (SelfJudge, {"threshold": math.inf}),
        (SelfJudge, {"timeout": -1}),
    ],
)
def test_a_detector_that_makes_no_sense_is_refused(make, fields):
    with pytest.raises(InvalidGuard):
        make(**fields)
