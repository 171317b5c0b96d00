"""Screens, releases and passes that begin early, as the loop asks for them; with scripted results, no model."""

import math
from dataclasses import dataclass, replace

import pytest
from PIL import Image

from stockade.engine.chat import Chat
from stockade.engine.errors import Aborted, InvalidGuard, PassError, PassTimeout
from stockade.engine.guards import (
    Cascade,
    Detoxify,
    EyesClosed,
    Guard,
    HarmHead,
    Probe,
    Refuse,
    SelfJudge,
    guarded,
    prompts,
)
from stockade.engine.images import load_image
from stockade.engine.passes import (
    Answer,
    Cancel,
    Choose,
    Chosen,
    Continue,
    Generate,
    Handle,
    ModelTraits,
    Score,
    Scored,
    Screen,
    Screened,
    Start,
    Stream,
    Wait,
)
from stockade.engine.request import Outcome, Verdict
from stockade.engine.sequence import PlacedImage
from stockade.engine.text import Untrusted, segments_text

CHAT = Chat.single("How?")
SEEN = Chat.single("What is this?", (load_image(Image.new("RGB", (4, 4))),))
SCREEN = Screen("detector", ())
TAP = Screen("probe", None)
GOOD, BAD = Scored(0.9, 0.5), Scored(0.1, 0.5)
SAFE, UNSAFE = Chosen((0.1, 0.8)), Chosen((0.8, 0.1))
PROTECTOR = Guard.protector(template="response")
ECSO = Guard.ecso(speculate=True)
TRAITS = {
    "mllm": ModelTraits(),
    "detector": ModelTraits("response"),
    "adapter": ModelTraits("question_answer", continues=True),
    "stranger": ModelTraits("response", backbone=1, continues=True),
    "probe": ModelTraits("response", in_context=True),
    "foreign_probe": ModelTraits("response", backbone=1, in_context=True),
    "detoxifier": ModelTraits(None, True),
}


def screened(text: str, value: float, screen: Screen = SCREEN, error: str | None = None) -> Answer:
    return Answer(text, screened=Screened(screen, value, 0.5, error))


def streamed(text: str, label: str = "answer", model: str = "mllm", images: tuple[PlacedImage, ...] = ()) -> Answer:
    stream = Stream(
        model=model, backbone="b", tokens=(1, 2), content=(1, 2), images=images, prompt_tokens=1, label=label
    )
    return Answer(text, stream=stream)


# --- screened verdicts ---


def test_a_screened_answer_needs_no_further_pass(play):
    decision, passes = play(guarded(CHAT, PROTECTOR), screened("fine", 0.9))
    assert [replace(passes[0], ahead=None)] == [Generate("mllm", CHAT, screen=SCREEN)]
    assert (decision.outcome, decision.verdicts) == (Outcome.CLEAN, [Verdict(0.9, 0.5, "harm_head")])


def test_a_rewrite_is_screened_like_the_answer(play):
    decision, passes = play(guarded(CHAT, PROTECTOR), screened("bad", 0.1), screened("good", 0.9))
    assert (passes[1].label, passes[1].screen) == ("rewrite", SCREEN)
    assert (decision.outcome, [one.score for one in decision.verdicts]) == (Outcome.MENDED, [0.1, 0.9])


def test_a_rewrite_that_nobody_judges_is_not_screened(play):
    _, passes = play(guarded(CHAT, replace(PROTECTOR, recheck=False)), screened("bad", 0.1), Answer("good"))
    assert passes[1].screen is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_a_screened_score_that_is_no_probability_is_nonsense(play, value):
    decision, _ = play(guarded(CHAT, PROTECTOR), screened("fine", value))
    assert (decision.outcome, decision.reason) == (Outcome.REFUSED, "nonsense")


def test_a_screen_that_failed_ends_in_the_refusal(play):
    decision, _ = play(guarded(CHAT, PROTECTOR), screened("fine", 0.9, error="too_long"))
    assert (decision.outcome, decision.reason) == (Outcome.REFUSED, "too_long")


@pytest.mark.parametrize("other", [Screen("other", ()), Screen("detector", (Untrusted("Q"),)), TAP])
def test_what_another_screen_found_counts_for_nothing(play, other):
    decision, passes = play(guarded(CHAT, PROTECTOR), screened("bad", 0.9, other), BAD, Answer("x"), GOOD)
    assert passes[1] == Score("detector", (Untrusted("bad"),), 0)
    assert decision.outcome == Outcome.MENDED


def test_a_guards_threshold_goes_before_the_heads_own_in_a_screen_too(play):
    guard = Guard.protector(template="response", threshold=0.95, detoxifier=None)
    assert play(guarded(CHAT, guard), screened("fine", 0.9)).result.outcome == Outcome.REFUSED


def test_a_screen_carries_all_that_its_head_was_told():
    told = {"threshold": 0.4, "prefix_threshold": 0.3, "stop_below": 0.2, "patience": 3, "chunk": 16, "timeout": 2.0}
    before = prompts.detector_before("question_answer", "How?")
    assert HarmHead("d", "question_answer", **told).screening(CHAT) == Screen("d", before, **told)
    assert Probe("p", **told).screening(CHAT) == Screen("p", None, **told)


@pytest.mark.parametrize("template", prompts.DETECTOR_TEMPLATES)
def test_a_screen_and_the_answer_are_the_detectors_whole_text(template):
    before = HarmHead(template=template).screening(CHAT).before
    assert (*before, Untrusted("Like this.")) == prompts.detector_text(template, "How?", "Like this.").segments


def test_an_answer_that_was_stopped_is_judged_by_its_screen(play):
    guard = Guard.protector(template="response", stop_below=0.2, threshold=0.5, patience=3)
    first = screened("ba", 0.1)._replace(stopped_early=True)
    decision, passes = play(guarded(CHAT, guard), first, screened("good", 0.9))
    assert (passes[0].screen.stop_below, passes[0].screen.patience) == (0.2, 3)
    assert passes[1].prompt == prompts.rewrite_with_question("How?", "ba")
    assert decision.outcome == Outcome.MENDED


def test_a_beginning_never_goes_out_as_the_answer(play):
    first = screened("fine so far", 0.9)._replace(stopped_early=True)
    decision, _ = play(guarded(CHAT, PROTECTOR), first)
    assert (decision.outcome, decision.reason) == (Outcome.REFUSED, "stopped early, but not harmful")


def test_an_answer_that_a_failed_screen_stopped_says_why_whoever_judges_it(play):
    guard = Guard(Cascade(HarmHead(template="response"), SelfJudge(), (0.2, 0.8)))
    first = screened("fine so far", math.nan, error="the pool is gone")._replace(stopped_early=True)
    decision, _ = play(guarded(CHAT, guard), first, SAFE)
    assert (decision.outcome, decision.reason) == (Outcome.REFUSED, "the pool is gone")


@dataclass(frozen=True)
class Meddling:
    """A remedy that asks for a text and shows another one."""

    name: str = "meddling"
    keeps_images: bool = True

    def mend(self, chat, answer):
        made = yield Generate("mllm", chat, "rewrite")
        return made._replace(text=made.text + ", and more")


def test_what_a_screen_found_is_not_said_of_a_text_it_has_not_read(play):
    guard = Guard(HarmHead(template="response"), Meddling())
    decision, passes = play(guarded(CHAT, guard), screened("bad", 0.1), screened("good", 0.9), BAD)
    assert passes[2] == Score("detector", (Untrusted("good, and more"),), 0)
    assert decision.outcome == Outcome.REFUSED


# --- a head that continues the answer, a head on its states ---


def test_an_activated_adapter_continues_the_answer(play):
    guard = Guard(HarmHead("adapter"))
    first = streamed("fine")
    decision, passes = play(guard.run(CHAT, TRAITS), first, GOOD)
    assert passes == [Generate("mllm", CHAT), Score("adapter", Continue(first))]
    assert decision.outcome == Outcome.CLEAN


@pytest.mark.parametrize(
    "mended", [Answer("x"), streamed("x", "rewrite"), streamed("x", "eyes_closed"), streamed("x", model="detoxifier")]
)
def test_an_activated_adapter_reads_texts_of_other_sequences_in_its_template(play, mended):
    guard = Guard(HarmHead("adapter"), Detoxify()).bind(TRAITS)
    _, passes = play(guarded(CHAT, guard), streamed("bad"), BAD, mended, GOOD)
    text = prompts.detector_text("question_answer", "How?", "x")
    assert passes[3] == Score("adapter", text.segments, text.pool_from)


def test_an_activated_adapter_never_reads_along():
    for head in (HarmHead("stranger"), HarmHead("adapter"), HarmHead("adapter", continues=False)):
        assert head.bind(TRAITS).screening(CHAT) is None


def test_a_probe_is_read_off_the_answer(play):
    guard = Guard(Probe(), Refuse())
    decision, passes = play(guard.run(CHAT, TRAITS), screened("fine", 0.9, TAP))
    assert passes == [Generate("mllm", CHAT, screen=TAP)]
    assert decision.verdicts == [Verdict(0.9, 0.5, "probe")]


def test_a_probe_says_nothing_of_what_it_has_not_seen(play):
    decision, passes = play(guarded(CHAT, Guard(Probe(), Detoxify())), screened("bad", 0.1, TAP), Answer("good"))
    assert passes[1].screen is None  # the detoxifier has other hidden states
    assert (decision.outcome, decision.reason) == (Outcome.REFUSED, "not screened")


def test_a_probes_fallback_judges_what_it_has_not_seen(play):
    guard = Guard(Probe(fallback=HarmHead()), Detoxify()).bind(TRAITS)
    decision, passes = play(guarded(CHAT, guard), screened("bad", 0.1, TAP), Answer("good"), GOOD)
    assert passes[2] == Score("detector", (Untrusted("good"),), 0)
    assert decision.outcome == Outcome.MENDED


def test_the_guard_probe(play):
    guard = Guard.probe(threshold=0.4, stop_below=0.1).bind(TRAITS)
    decision, passes = play(guarded(CHAT, guard), screened("bad", 0.3, passes_screen(guard)), Answer("good"), GOOD)
    assert passes[0].screen is not None and passes[0].screen.before is None and passes[0].screen.stop_below == 0.1
    assert passes[1].label == "rewrite" and passes[2] == Score("detector", (Untrusted("good"),), 0)
    assert decision.outcome == Outcome.MENDED
    decision, _ = play(guarded(CHAT, guard), screened("fine", 0.5, passes_screen(guard)))
    assert decision.outcome == Outcome.CLEAN
    alone = Guard.probe(detoxifier=None, fallback=None).bind(TRAITS)
    decision, passes = play(guarded(CHAT, alone), screened("bad", 0.1, TAP))
    assert decision.outcome == Outcome.REFUSED and len(passes) == 1
    without = {name: traits for name, traits in TRAITS.items() if name != "probe"}
    with pytest.raises(InvalidGuard, match="needs a model 'probe'"):
        Guard.probe().bind(without)


def passes_screen(guard):
    return guard.detector.screening(CHAT)


def test_a_probe_sees_the_mllms_second_answer_too(play):
    guard = Guard(Probe(), EyesClosed())
    decision, passes = play(guarded(CHAT, guard), screened("bad", 0.1, TAP), screened("good", 0.9, TAP))
    assert passes[1].screen == TAP
    assert decision.outcome == Outcome.MENDED


@pytest.mark.parametrize(
    ("detector", "says"),
    [
        (HarmHead("probe"), "use Probe"),
        (Probe("detector"), "not fitted on the hidden states of 'mllm'"),
        (Probe("foreign_probe"), "not fitted on the hidden states of 'mllm'"),
        (HarmHead("stranger", continues=True), "no activated adapter on 'mllm'"),
        (HarmHead("adapter", stop_below=0.1), "stop_below needs a head that screens"),
        (Probe(fallback=HarmHead("none")), "needs a model 'none'"),
        (HarmHead("mllm"), "names no text template"),
    ],
)
def test_a_head_that_does_not_fit_its_model_is_refused_before_any_pass(detector, says):
    with pytest.raises(InvalidGuard, match=says):
        Guard(detector).run(CHAT, TRAITS)


# --- the judge as a continuation ---


def test_the_judge_continues_the_answers_of_its_own_conversation(play):
    guard = Guard.ecso(mode="continue")
    first, second = streamed("bad"), streamed("good", "eyes_closed")
    decision, passes = play(guarded(SEEN, guard), first, UNSAFE, Answer("a cat"), second, SAFE)
    assert passes[1] == Choose("mllm", Continue(first, prompts.JUDGE_LAST), ("yes", "no"))
    assert passes[4] == Choose("mllm", Continue(second, prompts.JUDGE_LAST), ("yes", "no"))
    assert decision.outcome == Outcome.MENDED


PLACED: tuple[PlacedImage, ...] = (None,)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("judge", "answer"),
    [
        (SelfJudge(mode="continue"), Answer("x")),
        (SelfJudge(mode="continue"), streamed("x", "rewrite")),
        (SelfJudge(mode="continue"), streamed("x", "caption")),
        (SelfJudge(mode="continue"), streamed("x", model="detoxifier")),
        (SelfJudge(mode="continue", with_image=False), streamed("x", images=PLACED)),
        (SelfJudge(), streamed("x")),
    ],
)
def test_the_judge_asks_anew_about_all_else(play, judge, answer):
    _, passes = play(judge.judge(CHAT, answer), SAFE)
    assert passes[0].prompt == Chat.single(segments_text(prompts.judge("How?", "x")))


def test_a_continued_judge_that_answers_nothing_is_nonsense(play):
    verdict, _ = play(SelfJudge(mode="continue").judge(CHAT, streamed("x")), Chosen((0.01, 0.02)))
    assert verdict.reason == "nonsense"


# --- releases ---


def test_a_window_shows_what_is_screened_and_then_decides_as_ever(play):
    decision, passes = play(guarded(CHAT, PROTECTOR, "window"), screened("bad", 0.1), screened("good", 0.9))
    assert [ask.release for ask in passes] == ["window", "hold"]
    assert (decision.outcome, decision.answer.text) == (Outcome.MENDED, "good")
    assert play(guarded(CHAT, PROTECTOR, "window"), screened("x", math.nan)).result.outcome == Outcome.REFUSED


def test_an_audit_records_and_stops_nothing(play):
    guard = Guard.protector(template="response", stop_below=0.2)
    first = screened("bad", 0.1, replace(SCREEN, patience=2))
    decision, passes = play(guarded(CHAT, guard, "audit"), first)
    assert passes == [Generate("mllm", CHAT, release="audit", screen=SCREEN)]
    assert (decision.answer, decision.outcome) == (first, Outcome.FLAGGED)
    assert decision.reason == "harmful: 0.100 against 0.500"
    assert play(guarded(CHAT, guard, "audit"), screened("fine", 0.9)).result.outcome == Outcome.CLEAN


def test_an_audit_flags_what_its_detector_could_not_judge(play):
    decision, _ = play(guarded(SEEN, ECSO, "audit"), Answer("x"), PassTimeout("late"))
    assert (decision.answer.text, decision.outcome, decision.reason) == ("x", Outcome.FLAGGED, "timeout")


@pytest.mark.parametrize("release", ["verdict", "window", "audit"])
def test_without_a_guard_everything_is_live(play, release):
    decision, passes = play(Guard.off().run(CHAT, {}, release), Answer("x"))
    assert passes == [Generate("mllm", CHAT, release="live")]
    assert decision.outcome == Outcome.UNGUARDED


@pytest.mark.parametrize(
    ("guard", "release", "says"),
    [
        (Guard.ecso(), "window", "reads along; 'self_judge' does not"),
        (Guard.protector(template="response", screen=False), "window", "'harm_head' does not"),
        (Guard(HarmHead("adapter", "response", continues=True)), "window", "'harm_head' does not"),
        (Guard.protector(published=True), "window", "released script"),
        (Guard.ecso(published=True), "audit", "released script"),
        (PROTECTOR, "hold", "release must be one of verdict, window, audit, not 'hold'"),
        (Guard.off(), None, "release must be one of"),
    ],
)
def test_a_release_that_the_guard_cannot_do_is_refused_before_any_pass(guard, release, says):
    with pytest.raises(InvalidGuard, match=says):
        guarded(CHAT, guard, release)


@pytest.mark.parametrize("guard", [Guard.protector(published=True), Guard.ecso(published=True)])
def test_a_released_script_runs_nothing_beside_anything(play, guard):
    harmful = BAD if guard.name == "protector" else Answer("yes")
    rest = [Answer("good")] if guard.name == "protector" else [Answer("a cat"), Answer("good")]
    _, passes = play(guarded(SEEN, guard), streamed("bad"), harmful, *rest)
    generated = [ask for ask in passes if isinstance(ask, Generate)]
    assert all((ask.screen, ask.ahead, ask.draft_tokens) == (None, None, None) for ask in generated)


# --- before the verdict ---


def test_a_rewrites_prompt_is_known_ahead(play):
    _, passes = play(guarded(CHAT, PROTECTOR), screened("bad", 0.1), screened("good", 0.9))
    ahead = passes[0].ahead
    assert (ahead.model, ahead.prompt("bad")) == ("detoxifier", passes[1].prompt)


@pytest.mark.parametrize(
    "guard",
    [
        Guard.protector(template="response", speculate=False),
        Guard.protector(template="response", max_rounds=0),
        Guard.protector(template="response", detoxifier=None),
        Guard(SelfJudge(), Detoxify(), speculate=True),
        Guard(HarmHead(template="response"), EyesClosed(), speculate=True),
    ],
)
def test_nothing_is_computed_ahead_where_no_screened_rewrite_can_follow(guard):
    assert next(guarded(SEEN, guard)).ahead is None


CAPTION = EyesClosed().start(SEEN)
HANDLE = Handle(3)


def test_a_caption_begins_before_the_verdict_and_is_waited_for(play):
    script = [Answer("bad"), HANDLE, UNSAFE, Answer("a cat"), Answer("good"), SAFE]
    decision, passes = play(guarded(SEEN, ECSO), *script)
    assert passes[1:4] == [Start(CAPTION), Choose("mllm", passes[2].prompt, ("yes", "no")), Wait(HANDLE)]
    assert passes[4].prompt == Chat.single(segments_text(prompts.eyes_closed("What is this?", "a cat")))
    assert (decision.outcome, len(passes)) == (Outcome.MENDED, 6)


def test_a_caption_that_nobody_needs_is_canceled(play):
    decision, passes = play(guarded(SEEN, ECSO), Answer("fine"), HANDLE, SAFE, None)
    assert (passes[-1], decision.outcome) == (Cancel(HANDLE), Outcome.CLEAN)


@pytest.mark.parametrize("error", [PassTimeout("late"), RuntimeError("odd")])
def test_a_detector_that_raises_leaves_nothing_running(play, error):
    decision, passes = play(guarded(SEEN, ECSO), Answer("x"), HANDLE, error, None)
    assert (passes[-1], decision.outcome) == (Cancel(HANDLE), Outcome.REFUSED)


def test_an_abort_leaves_nothing_running():
    loop = guarded(SEEN, ECSO)
    next(loop)
    loop.send(Answer("x"))
    loop.send(HANDLE)
    assert loop.throw(Aborted("gone")) == Cancel(HANDLE)
    with pytest.raises(Aborted):
        loop.send(None)


def test_a_loop_with_a_running_pass_can_be_closed():
    loop = guarded(SEEN, ECSO)
    next(loop)
    loop.send(Answer("x"))
    loop.send(HANDLE)
    loop.close()
    with pytest.raises(StopIteration):
        next(loop)


@dataclass(frozen=True)
class Hasty(Refuse):
    """A remedy that starts a pass and never asks for it again."""

    def start(self, chat):
        return CAPTION

    def mend(self, chat, answer, started=None):
        return (yield from super().mend(chat, answer))


def test_what_a_remedy_forgets_is_canceled(play):
    guard = Guard(SelfJudge(), Hasty(), speculate=True)
    decision, passes = play(guarded(SEEN, guard), Answer("x"), HANDLE, UNSAFE, None)
    assert (passes[-1], decision.outcome) == (Cancel(HANDLE), Outcome.REFUSED)


@pytest.mark.parametrize("refusal", [PassError("no room"), None])
def test_a_caption_that_cannot_begin_early_is_asked_for_later(play, refusal):
    script = [Answer("bad"), refusal, UNSAFE, Answer("a cat"), Answer("good"), SAFE]
    decision, passes = play(guarded(SEEN, ECSO), *script)
    assert (passes[3], decision.outcome) == (CAPTION, Outcome.MENDED)


def test_a_started_caption_that_fails_ends_in_the_refusal(play):
    decision, passes = play(guarded(SEEN, ECSO), Answer("bad"), HANDLE, UNSAFE, PassError("odd"))
    assert (passes[-1], decision.reason) == (Wait(HANDLE), "eyes_closed: odd")


def test_nothing_begins_early_without_need(play):
    _, passes = play(guarded(CHAT, ECSO), Answer("fine"), SAFE)  # no image to describe
    assert len(passes) == 2
    screened_guard = Guard(HarmHead(template="response"), EyesClosed(), speculate=True)
    _, passes = play(guarded(SEEN, screened_guard), screened("fine", 0.9))  # the verdict is there already
    assert len(passes) == 1
    _, passes = play(guarded(SEEN, Guard(SelfJudge(), EyesClosed())), Answer("fine"), SAFE)
    assert len(passes) == 2
