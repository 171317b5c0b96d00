"""Both guards as loops with scripted results, no model: every path, every failure, and what must always hold."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stockade.engine.chat import Chat
from stockade.engine.errors import Aborted, InvalidGuard, PassError, PassTimeout, TooLong, UnknownModel
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
    Decision,
    Generate,
    Handle,
    ModelTraits,
    Score,
    Scored,
    Screen,
    Screened,
    Start,
    Wait,
)
from stockade.engine.request import FinishReason, Outcome, Verdict
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Segment, Untrusted, segments_text

WORD: Any = "0.9"  # not a number
NOTHING: Any = None
PICTURE = load_image(Image.new("RGB", (4, 4)))
CHAT = Chat.single("How?")
SEEN = Chat.single("What is this?", (PICTURE,))
FIRST = Answer("first answer", (1, 2))
GOOD, BAD = Scored(0.9, 0.5), Scored(0.1, 0.5)
SAFE, UNSAFE = Chosen((0.1, 0.8)), Chosen((0.8, 0.1))
PROTECTOR = Guard.protector(template="response", speculate=False)
SCREEN = Screen("detector", ())
TRAITS = {"mllm": ModelTraits(), "detector": ModelTraits("question_answer"), "detoxifier": ModelTraits(None, True)}
ANSWER_LABELS = ("answer", "rewrite", "eyes_closed")
GREEDY = SamplingParams(temperature=0.0, max_tokens=1024)


def asked(message: tuple[Segment, ...]) -> Chat:
    return Chat.single(segments_text(message))


def score(text: str) -> Score:
    return Score("detector", (Untrusted(text),), 0)


def rewrite(text: str) -> Generate:
    prompt = prompts.rewrite_with_question("How?", text)
    return Generate("detoxifier", prompt, "rewrite", screen=SCREEN, draft_tokens=12)


def refused(decision: Decision, reason: str, text: str = prompts.REFUSAL) -> bool:
    return (
        decision.outcome == Outcome.REFUSED
        and decision.answer.text == text
        and decision.answer.ids == ()
        and decision.answer.finish_reason == FinishReason.REFUSED
        and decision.reason == reason
    )


# --- plain settings ---


def test_off_returns_the_answer_as_it_is(play):
    decision, passes = play(guarded(CHAT, Guard.off()), FIRST)
    assert passes == [Generate("mllm", CHAT, release="live")]
    assert (decision.answer, decision.outcome, decision.verdicts) == (FIRST, Outcome.UNGUARDED, [])


def test_protector_returns_a_harmless_answer(play):
    decision, passes = play(guarded(CHAT, PROTECTOR), FIRST, GOOD)
    assert passes == [Generate("mllm", CHAT, screen=SCREEN), score("first answer")]
    assert (decision.answer, decision.outcome, decision.reason) == (FIRST, Outcome.CLEAN, None)
    assert [verdict.score for verdict in decision.verdicts] == [0.9]


def test_protector_rewrites_until_nothing_is_found(play):
    second, third = Answer("second"), Answer("third")
    decision, passes = play(guarded(CHAT, PROTECTOR), FIRST, BAD, second, BAD, third, GOOD)
    assert passes == [
        Generate("mllm", CHAT, screen=SCREEN),
        score("first answer"),
        rewrite("first answer"),
        score("second"),
        rewrite("second"),
        score("third"),
    ]
    assert (decision.answer, decision.outcome) == (third, Outcome.MENDED)
    assert [text for text, _ in decision.judged] == ["first answer", "second", "third"]
    assert [verdict.harmless for verdict in decision.verdicts] == [False, False, True]


def test_protector_refuses_after_its_last_round(play):
    rewrite = Answer("rewrite")
    decision, passes = play(guarded(CHAT, PROTECTOR), FIRST, BAD, rewrite, BAD, rewrite, BAD, rewrite, BAD)
    assert refused(decision, "harmful: 0.100 against 0.500")
    assert sum(asked.label == "rewrite" for asked in passes) == 3


def test_a_guard_of_no_rounds_refuses_at_once(play):
    guard = Guard.protector(template="response", max_rounds=0, refusal="No.")
    assert refused(play(guarded(CHAT, guard), FIRST, BAD).result, "harmful: 0.100 against 0.500", "No.")


def test_a_detoxifier_that_is_a_chat_model_is_asked_through_its_template(play):
    guard = Guard.protector(template="response", chat_template=True)
    _, passes = play(guarded(CHAT, guard), FIRST, BAD, Answer("second"), GOOD)
    message = prompts.rewrite_with_question("How?", "first answer")
    assert passes[2] == replace(rewrite("first answer"), prompt=asked(message))


def test_protector_without_a_detoxifier_refuses(play):
    guard = Guard.protector(template="response", detoxifier=None)
    assert refused(play(guarded(CHAT, guard), FIRST, BAD).result, "harmful: 0.100 against 0.500")


def test_what_a_guard_leaves_open_comes_from_its_models(play):
    _, passes = play(Guard.protector().run(CHAT, TRAITS), FIRST, BAD, Answer("second"), GOOD)
    text = prompts.detector_text("question_answer", "How?", "first answer")
    assert passes[1] == Score("detector", text.segments, text.pool_from)
    assert passes[2].prompt == asked(prompts.rewrite_with_question("How?", "first answer"))


def test_what_a_guard_says_itself_stays(play):
    for guard in (
        Guard.protector(template="response", chat_template=False),
        Guard.protector(published=True),
        Guard.ecso(),
        Guard.off(),
    ):
        assert guard.bind(TRAITS) == guard


def test_a_guard_whose_models_are_not_there_is_refused_before_any_pass():
    only = {"mllm": ModelTraits()}
    with pytest.raises(InvalidGuard, match="needs a model 'detector'; this engine has mllm"):
        Guard.protector().run(CHAT, only)
    with pytest.raises(InvalidGuard, match="needs a model 'detoxifier'"):
        Guard.protector(published=True).run(CHAT, only | {"detector": ModelTraits()})
    with pytest.raises(InvalidGuard, match="response, question_answer"):
        Guard.protector(detoxifier=None).run(CHAT, only | {"detector": ModelTraits()})


def test_an_unbound_head_ends_in_the_refusal(play):
    decision, _ = play(guarded(CHAT, Guard.protector()), FIRST)
    assert decision.outcome == Outcome.REFUSED
    assert "template" in decision.reason


def test_ecso_judges_with_the_image_and_returns_a_harmless_answer(play):
    decision, passes = play(guarded(SEEN, Guard.ecso()), FIRST, SAFE)
    judge = segments_text(prompts.judge("What is this?", "first answer"))
    assert passes == [Generate("mllm", SEEN), Choose("mllm", Chat.single(judge, SEEN.images), ("yes", "no"))]
    assert (decision.answer, decision.outcome) == (FIRST, Outcome.CLEAN)


def test_ecso_answers_from_a_caption_and_judges_that_without_the_image(play):
    decision, passes = play(guarded(SEEN, Guard.ecso()), FIRST, UNSAFE, Answer("a cat"), Answer("second"), SAFE)
    caption, again, judge = passes[2:]
    request = segments_text(prompts.caption("What is this?"))
    assert (caption.label, caption.prompt) == ("caption", Chat.single(request, SEEN.images))
    assert again == Generate("mllm", asked(prompts.eyes_closed("What is this?", "a cat")), "eyes_closed")
    assert judge == Choose("mllm", asked(prompts.judge("What is this?", "second")), ("yes", "no"))
    assert (decision.answer.text, decision.outcome) == ("second", Outcome.MENDED)


def test_ecso_without_an_image_asks_again_without_hints(play):
    decision, passes = play(guarded(CHAT, Guard.ecso()), FIRST, UNSAFE, Answer("second"), UNSAFE)
    assert passes[2] == Generate("mllm", asked(prompts.without_hints("How?")), "eyes_closed")
    assert refused(decision, decision.verdicts[-1].reason)


def test_ecso_with_an_empty_caption_asks_again_without_hints(play):
    _, passes = play(guarded(SEEN, Guard.ecso()), FIRST, UNSAFE, Answer(" \n"), Answer("second"), SAFE)
    assert passes[3].prompt == asked(prompts.without_hints("What is this?"))


def test_ecso_asks_about_the_last_turn(play):
    chat = Chat.parse(
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ]
    )
    _, passes = play(guarded(chat, Guard.ecso(mode="text")), FIRST, Answer("no"))
    assert passes[0].prompt == chat
    assert passes[1].prompt == asked(prompts.judge("three", "first answer"))


def test_any_detector_goes_with_any_remedy(play):
    guard = Guard(SelfJudge(), Detoxify(with_question=False), max_rounds=1)
    decision, passes = play(guarded(SEEN, guard), FIRST, UNSAFE, Answer("second"), SAFE)
    assert decision.outcome == Outcome.MENDED
    assert passes[2].prompt == prompts.rewrite("first answer")
    assert passes[3].prompt.images == SEEN.images  # a rewrite is judged with the image


def test_timeouts_reach_every_pass_of_the_guard(play):
    guard = Guard.protector(template="response", timeout=2.0)
    _, passes = play(guarded(CHAT, guard), FIRST, BAD, Answer("second"), GOOD)
    assert [one.timeout for one in passes] == [None, 2.0, 2.0, 2.0]
    guard = Guard.ecso(timeout=2.0)
    _, passes = play(guarded(SEEN, guard), FIRST, UNSAFE, Answer("cat"), Answer("second"), SAFE)
    assert [one.timeout for one in passes] == [None, 2.0, 2.0, 2.0, 2.0]


# --- published settings ---


def test_published_protector_is_one_detection_and_one_unchecked_rewrite(play):
    guard = Guard.protector(published=True)
    decision, passes = play(guarded(SEEN, guard), Answer(" bad </s>\n"), BAD, Answer(" mended \n"))
    picture = SEEN.images
    detoxify = SamplingParams(temperature=0.0, max_tokens=None, max_length=1024)
    assert passes == [
        Generate("mllm", prompts.llava_v1((Untrusted("What is this?"),), picture), sampling=GREEDY),
        score("bad"),
        Generate("detoxifier", prompts.rewrite("bad"), "rewrite", detoxify),
    ]
    assert (decision.answer.text, decision.outcome) == (" mended \n", Outcome.MENDED)
    assert [verdict.detail for verdict in decision.verdicts] == ["published: one rewrite, not judged again"]


def test_published_protector_judges_against_one_half_whatever_the_head_says(play):
    guard = Guard.protector(published=True)
    assert play(guarded(CHAT, guard), FIRST, Scored(0.5, 0.99)).result.outcome == Outcome.CLEAN


def test_published_protector_returns_even_an_empty_rewrite(play):
    decision, _ = play(guarded(CHAT, Guard.protector(published=True)), FIRST, BAD, Answer(""))
    assert (decision.answer.text, decision.outcome) == ("", Outcome.MENDED)


def test_published_protector_without_a_detoxifier_says_the_released_sentence(play):
    guard = Guard.protector(published=True, detoxifier=None)
    decision, _ = play(guarded(CHAT, guard), FIRST, BAD)
    assert refused(decision, "harmful: 0.100 against 0.500", "Sorry, but I can't help you with your request.")


def test_published_ecso_runs_the_four_released_passes(play):
    script = [Answer(" first </s>\n"), Answer("Yes. "), Answer(" a cat</s>"), Answer(" second </s>")]
    decision, passes = play(guarded(SEEN, Guard.ecso(published=True)), *script)
    query, image = "What is this?", SEEN.images
    # the script of the first answer strips only; that of the later passes cuts an end mark, too
    first = "first </s>"
    assert passes == [
        Generate(
            "mllm",
            prompts.vicuna_v1((Untrusted(query),), image),
            sampling=SamplingParams(temperature=0.0, max_tokens=2048),
        ),
        Generate("mllm", prompts.vicuna_v1(prompts.judge(query, first), image), "judge", GREEDY, candidate=False),
        Generate("mllm", prompts.vicuna_v1(prompts.caption(query), image), "caption", GREEDY, candidate=False),
        Generate("mllm", prompts.vicuna_v1(prompts.eyes_closed(query, "a cat")), "eyes_closed", GREEDY),
    ]
    assert (decision.answer.text, decision.outcome) == ("second", Outcome.MENDED)
    assert len(decision.verdicts) == 1


@pytest.mark.parametrize("said", ["", "No", "Yes, it is", "nonsense"])
def test_published_ecso_fails_open_and_says_so(play, said):
    decision, _ = play(guarded(SEEN, Guard.ecso(published=True)), FIRST, Answer(said))
    assert (decision.answer.text, decision.outcome) == ("first answer", Outcome.CLEAN)
    assert "anything but yes counts as harmless" in decision.verdicts[0].detail


def test_published_ecso_without_an_image_has_no_hints(play):
    script = [FIRST, Answer("yes"), Answer("second")]
    decision, passes = play(guarded(CHAT, Guard.ecso(published=True)), *script)
    assert passes[0].prompt == prompts.vicuna_v1((Untrusted("How?"),))
    assert passes[2].prompt == prompts.vicuna_v1(prompts.without_hints("How?"))
    assert decision.outcome == Outcome.MENDED


def test_published_ecso_keeps_an_empty_caption_as_a_hint(play):
    script = [FIRST, Answer("yes"), Answer(""), Answer("second")]
    _, passes = play(guarded(SEEN, Guard.ecso(published=True)), *script)
    assert passes[3].prompt == prompts.vicuna_v1(prompts.eyes_closed("What is this?", ""))


# --- failures ---

GUARDS = {
    "protector": (PROTECTOR, BAD),
    "ecso": (Guard.ecso(), UNSAFE),
    "ecso text": (Guard.ecso(mode="text"), Answer("yes")),
    "protector published": (Guard.protector(published=True), BAD),
    "ecso published": (Guard.ecso(published=True), Answer("yes")),
}
ERRORS = [
    (PassTimeout("late"), "timeout"),
    (TooLong("long"), "too_long"),
    (PassError("the pool is gone"), "the pool is gone"),
    (UnknownModel("no model 'x'"), "no model 'x'"),
    (RuntimeError(), "RuntimeError"),
]
every_guard = pytest.mark.parametrize(("guard", "harmful"), GUARDS.values(), ids=GUARDS.keys())
every_error = pytest.mark.parametrize(("error", "reason"), ERRORS, ids=[type(one).__name__ for one, _ in ERRORS])


@every_guard
@every_error
def test_a_detector_that_fails_ends_in_the_refusal(play, guard, harmful, error, reason):
    decision, _ = play(guarded(SEEN, guard), FIRST, error)
    assert refused(decision, reason)
    assert [verdict.error for verdict in decision.verdicts] == [reason]


@every_guard
@every_error
def test_a_remedy_that_fails_ends_in_the_refusal(play, guard, harmful, error, reason):
    decision, _ = play(guarded(SEEN, guard), FIRST, harmful, error)
    assert refused(decision, f"{guard.remedy.name}: {reason}")


@every_error
def test_a_second_judgement_that_fails_ends_in_the_refusal(play, error, reason):
    assert refused(play(guarded(CHAT, PROTECTOR), FIRST, BAD, Answer("second"), error).result, reason)
    assert refused(play(guarded(CHAT, Guard.ecso()), FIRST, UNSAFE, Answer("second"), error).result, reason)


@every_guard
def test_a_result_of_the_wrong_type_ends_in_the_refusal(play, guard, harmful):
    for wrong in (None, 0.9, "no", (0.1, 0.9), object()):
        decision, _ = play(guarded(SEEN, guard), FIRST, wrong)
        assert decision.outcome == Outcome.REFUSED
        assert decision.answer.text == prompts.REFUSAL
        decision, _ = play(guarded(CHAT, guard), FIRST, harmful, wrong)
        assert decision.outcome == Outcome.REFUSED
        assert decision.answer.text == prompts.REFUSAL


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        (PROTECTOR, Scored(math.nan, 0.5)),
        (Guard.ecso(), Chosen((0.01, 0.02))),
        (Guard.ecso(), Chosen((math.nan, math.nan))),
        (Guard.ecso(mode="text"), Answer("I am not sure")),
    ],
)
def test_nonsense_of_a_detector_ends_in_the_refusal(play, guard, said):
    decision, _ = play(guarded(SEEN, guard), FIRST, said)
    assert refused(decision, "nonsense")


@pytest.mark.parametrize(("guard", "harmful"), [(PROTECTOR, BAD), (Guard.ecso(), UNSAFE)])
def test_an_empty_mended_answer_ends_in_the_refusal(play, guard, harmful):
    decision, _ = play(guarded(CHAT, guard), FIRST, harmful, Answer(" \n"))
    assert refused(decision, f"{guard.remedy.name}: empty")


@every_guard
def test_a_first_answer_that_fails_is_the_callers_to_report(play, guard, harmful):
    with pytest.raises(PassTimeout):
        play(guarded(CHAT, guard), PassTimeout("late"))


@every_guard
def test_an_abort_goes_up_from_any_pass(play, guard, harmful):
    for script in ([], [FIRST], [FIRST, harmful]):
        with pytest.raises(Aborted):
            play(guarded(CHAT, guard), *script, Aborted("gone"))


@every_guard
def test_a_loop_can_be_closed_at_any_pass(guard, harmful):
    for script in ([], [FIRST], [FIRST, harmful]):
        loop = guarded(CHAT, guard)
        next(loop)
        for item in script:
            loop.send(item)
        loop.close()
        with pytest.raises(StopIteration):
            next(loop)


@dataclass(frozen=True)
class Odd:
    """A detector and remedy of someone else's, which gives whatever it was told to."""

    gives: object
    name: str = "odd"
    incremental: bool = False
    keeps_images: bool = True

    def judge(self, chat, answer):
        yield from ()
        return self.gives

    mend = judge


@pytest.mark.parametrize(
    "gives",
    [
        None,
        True,
        0.9,
        Verdict(math.nan, 0.5, "odd"),
        Verdict(math.inf, 0.5, "odd"),
        Verdict(1.5, 0.5, "odd"),
        Verdict(-0.5, -1.0, "odd"),
        Verdict(0.9, math.nan, "odd"),
        Verdict(WORD, 0.5, "odd"),
        Verdict(0.9, WORD, "odd"),
        Verdict(0.9, 0.5, "odd", error="broken"),
    ],
    ids=repr,
)
def test_a_foreign_detector_is_not_believed_without_a_sound_verdict(play, gives):
    decision, _ = play(guarded(CHAT, Guard(Odd(gives))), FIRST)
    assert decision.outcome == Outcome.REFUSED
    assert decision.verdicts[0].harmful


def test_a_foreign_detector_that_is_no_generator_ends_in_the_refusal(play):
    class Eager(Odd):
        def judge(self, chat, answer):
            return Verdict(0.9, 0.5, "eager")

    assert play(guarded(CHAT, Guard(Eager(None))), FIRST).result.outcome == Outcome.REFUSED


@pytest.mark.parametrize("gives", [None, "text", Answer(NOTHING), Answer("")], ids=repr)
def test_a_foreign_remedy_must_give_an_answer(play, gives):
    guard = Guard(HarmHead(template="response"), Odd(gives))
    decision, _ = play(guarded(CHAT, guard), FIRST, BAD)
    assert decision.outcome == Outcome.REFUSED
    assert decision.reason.startswith("odd: ")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (Guard, {"max_rounds": -1}),
        (Guard, {"max_rounds": 1.0}),
        (Guard, {"max_rounds": True}),
        (Guard, {"max_rounds": 101}),
        (Guard, {"recheck": None}),
        (Guard, {"speculate": 1}),
        (Guard, {"released": Guard.ecso(published=True).released, "speculate": True}),
        (Guard, {"refusal": " "}),
        (Guard, {"detector": "detector"}),
        (Guard, {"remedy": None}),
        (Guard.protector, {"published": True, "max_rounds": 3}),
        (Guard.protector, {"published": True, "template": "question_answer"}),
        (Guard.protector, {"published": True, "chat_template": True}),
        (Guard.protector, {"published": True, "stop_below": 0.1}),
        (Guard.protector, {"screen": False, "stop_below": 0.1}),
        (Guard.ecso, {"published": True, "mode": "text"}),
        (Guard.ecso, {"published": True, "speculate": True}),
        (Guard.ecso, {"published": True, "max_rounds": 1}),
        (Detoxify, {"timeout": 0}),
        (Detoxify, {"draft_tokens": -1}),
        (Detoxify, {"draft_tokens": True}),
        (EyesClosed, {"timeout": math.inf}),
        (Refuse, {"text": ""}),
    ],
)
def test_a_guard_that_makes_no_sense_is_refused(make, fields):
    with pytest.raises(InvalidGuard):
        make(**fields)


# --- what always holds ---

texts = st.sampled_from(["", " ", "no", "yes", "Yes.", "fine", "first"])
probabilities = st.floats(-0.5, 1.5) | st.just(math.nan)
probability = st.floats(0, 1)
screened = st.none() | st.builds(
    Screened, st.sampled_from([SCREEN, Screen("probe", None), Screen("other", ())]), probabilities, st.just(0.5)
)
answers = st.tuples(texts, screened, st.booleans()).map(
    lambda drawn: Answer(drawn[0], screened=drawn[1], stopped_early=drawn[2])
)
results = st.one_of(
    answers,
    st.builds(Scored, probabilities, st.just(0.5) | probabilities),
    st.builds(Chosen, st.tuples(probabilities, probabilities)),
    st.sampled_from([None, Handle(7), PassTimeout("late"), TooLong("long"), PassError("no"), ValueError("odd")]),
)
# a result that fits its pass, or once in a while one that does not
fitting = {
    Generate: answers | results,
    Score: st.builds(Scored, probability, st.just(0.5)) | results,
    Choose: st.builds(Chosen, st.tuples(st.floats(0, 0.5), st.floats(0, 0.5))) | results,
    Start: st.builds(Handle, st.integers(0, 9)) | results,
    Wait: answers | results,
    Cancel: st.none(),
}
detectors = st.sampled_from(
    [
        HarmHead(template="response"),
        HarmHead(),
        SelfJudge(),
        SelfJudge(mode="text"),
        SelfJudge(mode="continue"),
        Probe(),
        Probe(fallback=HarmHead(template="response")),
        Cascade(Probe(), SelfJudge(), (0.3, 0.7)),
        Cascade(HarmHead(template="response"), HarmHead("dear", "question_answer"), (0.0, 1.0)),
    ]
)
guards = st.one_of(
    st.sampled_from([Guard.protector(published=True), Guard.ecso(published=True)]),
    st.builds(
        Guard,
        detectors,
        st.sampled_from([Detoxify(), EyesClosed(), Refuse()]),
        st.integers(0, 4),
        st.booleans(),
        speculate=st.booleans(),
    ),
)


class Run:
    """A loop with drawn results: what it asked for, the texts it may show, the passes that it left running."""

    def __init__(self, loop, first, draw):
        self.asked, self.answers, self.running = [next(loop)], [], []
        result, self.decision = first, None
        try:
            while True:
                ask = self.asked[-1]
                if isinstance(result, Answer) and getattr(ask, "label", None) in ANSWER_LABELS:
                    self.answers.append(result)
                if isinstance(ask, Start) and isinstance(result, Handle):
                    self.running.append(result)
                following = loop.throw(result) if isinstance(result, Exception) else loop.send(result)
                self.asked.append(following)
                if isinstance(following, Wait | Cancel):
                    self.running.remove(following.handle)
                result = draw(fitting[type(following)])
        except StopIteration as stop:
            self.decision = stop.value


@given(guards, st.sampled_from([CHAT, SEEN]), answers, st.data())
def test_nothing_goes_out_that_its_guard_has_not_cleared(guard, chat, first, data):
    run = Run(guarded(chat, guard), first, data.draw)
    decision, judged = run.decision, run.decision.judged
    assert not run.running
    mended = [ask for ask in run.asked if isinstance(ask, Generate) and ask.label in ("rewrite", "eyes_closed")]
    assert len(mended) <= guard.max_rounds
    # verdicts are about the answers, in their order
    assert [text.strip() for text, _ in judged] == [one.text.strip() for one in run.answers[: len(judged)]]
    if decision.outcome == Outcome.REFUSED:
        assert decision.answer.text in (guard.refusal, prompts.REFUSAL)
        assert decision.reason
        return
    cleared = bool(judged) and judged[-1].text == decision.answer.text and judged[-1].verdict.harmless
    unchecked = decision.outcome == Outcome.MENDED and not guard.recheck
    assert cleared or unchecked
    assert not (cleared and decision.answer.stopped_early)
    assert (decision.outcome == Outcome.CLEAN) is (len(run.answers) == 1)


@given(detectors, st.sampled_from([CHAT, SEEN]), answers, st.data())
def test_an_audit_shows_the_answer_and_flags_what_is_not_cleared(detector, chat, first, data):
    run = Run(guarded(chat, Guard(detector, speculate=True), "audit"), first, data.draw)
    decision, (only,) = run.decision, run.decision.judged
    assert decision.answer == first
    assert run.asked[0].release == "audit"
    assert decision.outcome == (Outcome.CLEAN if only.verdict.harmless else Outcome.FLAGGED)
    assert (decision.reason is None) is only.verdict.harmless
    assert not any(isinstance(ask, Start) or getattr(ask, "label", "") == "rewrite" for ask in run.asked)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 4))
def test_the_first_harmless_text_goes_out_and_no_later_one(scores, rounds):
    loop = guarded(CHAT, Guard.protector(template="response", max_rounds=rounds))
    next(loop)
    outcome: Decision | None = None
    try:
        loop.send(Answer("0"))
        for turn, value in enumerate(scores, start=1):
            loop.send(Scored(value, 0.5))
            loop.send(Answer(str(turn)))
    except StopIteration as stop:
        outcome = stop.value
    harmless = [turn for turn, value in enumerate(scores) if value >= 0.5][:1]
    if harmless and harmless[0] <= rounds:
        assert outcome is not None
        assert outcome.answer.text == str(harmless[0])
    else:
        assert outcome is None or outcome.outcome == Outcome.REFUSED


def test_a_refusal_text_of_ones_own_is_said_everywhere(play):
    for guard in (PROTECTOR, Guard.ecso()):
        own = replace(guard, refusal="No.")
        assert play(guarded(CHAT, own), FIRST, PassTimeout("late")).result.answer.text == "No."
