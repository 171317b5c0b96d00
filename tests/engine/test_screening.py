"""A screened score is the score of one pass over the final text, whatever happened on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from stockade.engine.engine import Engine
from stockade.engine.errors import InvalidGuard, PromptTooLong, StockadeError, TooLong
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.model import Model
from stockade.engine.passes import Answer, Decision, Generate, Score, Screen
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Segment, Trusted, Untrusted
from tests.conftest import BASE, save_tokenizer, scatter_norms
from tests.engine.screened import (
    ask,
    asking,
    between,
    detector_on,
    engine_of,
    finish,
    force,
    head,
    probe_on,
    replied,
    submit,
    with_models,
)
from tests.engine.test_growing import CODECS, PROSE, sources

VOCAB = 1400  # as many as the largest of the tokenizers has
PROMPT = tuple(range(5, 25))
QUESTION: tuple[Segment, ...] = (Trusted("Question: "), Untrusted("How? "), Trusted("\n\nAnswer: "))
WRITERS = ("byte-level", "llama", "grouping")


class Mate(NamedTuple):
    """An answer of a batch: a forced beginning, and how the rest is sampled."""

    text: str
    ends: bool  # with an end token behind the forced text
    seed: int
    most: int
    chunk: int | None
    before: tuple[Segment, ...]
    stop: tuple[str, ...]


mates = st.builds(
    Mate,
    sources,
    st.booleans(),
    st.integers(0, 9),
    st.integers(1, 90),
    st.sampled_from([1, 2, 5, 16, None]),
    st.sampled_from([(), QUESTION]),
    st.sampled_from([(), (), ("e", "ab"), ("\n",)]),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A language model and a classifier of other weights, with room for every tokenizer."""
    config = {**BASE, "vocab_size": VOCAB, "num_labels": 1}
    kinds = {"mllm": AutoModelForCausalLM, "detector": AutoModelForSequenceClassification}
    folders = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        model = kind.from_config(LlamaConfig(**config))
        scatter_norms(model)
        model.eval().save_pretrained(folders[name])
        save_tokenizer(folders[name])
    return load_models(folders["mllm"], folders["detector"], dtype=torch.float32).models


HEADS: dict[str, Callable[[Model], Model]] = {
    "classifier": lambda detector: detector,
    "mean in the middle": lambda detector: detector_on(detector, head(2, "mean")),
    "last in the middle": lambda detector: detector_on(detector, head(2, "last")),
}


def pair(bases: dict[str, Model], kind: str, writer: str, reader: str) -> ModelSet:
    detector = replace(HEADS[kind](bases["detector"]), codec=CODECS[reader])
    mllm = replace(bases["mllm"], codec=CODECS[writer])
    return ModelSet({"mllm": mllm, "detector": detector}, torch.device("cpu"), torch.float32)


class Watched:
    """Counts what should have happened at least once."""

    def __init__(self) -> None:
        self.pages_given_back = 0
        self.preempted_screens = 0

    def of(self, engine: Engine) -> None:
        roll_back = engine.scheduler.roll_back

        def counted(sequence: Any, keep: int) -> None:
            pages = len(sequence.table.pages)
            roll_back(sequence, keep)
            self.pages_given_back += pages - len(sequence.table.pages)

        engine.scheduler.roll_back = counted  # type: ignore[method-assign]
        preempt = engine.scheduler._preempt

        def preempted(sequence: Any) -> None:
            self.preempted_screens += sequence.open
            preempt(sequence)

        engine.scheduler._preempt = preempted  # type: ignore[method-assign]


def screened_and_scored(engine: Engine, many: list[Mate], watched: Watched) -> list[tuple[Answer, Mate]]:
    codec = engine.models["mllm"].codec
    targets: dict[int, list[int]] = {}
    force(engine, targets)
    watched.of(engine)
    answers: list[Answer] = []

    def loop(mate: Mate) -> Any:
        answer = yield Generate("mllm", PROMPT, screen=Screen("detector", mate.before, chunk=mate.chunk))
        answers.append(answer)
        found.append((answer, mate))
        return Decision(answer, Outcome.CLEAN)

    found: list[tuple[Answer, Mate]] = []
    requests = []
    for mate in many:
        params = SamplingParams(temperature=1.0, seed=mate.seed, max_tokens=mate.most, stop=mate.stop)
        request = submit(engine, loop(mate), params)
        targets[request.id] = codec.encode((Untrusted(mate.text),), add_special_tokens=False)
        if mate.ends:
            targets[request.id].append(min(codec.eos_ids))
        requests.append(request)
    finish(engine)
    assert [replied(request).error for request in requests] == [None] * len(many)
    return found


def check(models: ModelSet, answer: Answer, mate: Mate) -> None:
    assert answer.screened is not None
    segments = (*mate.before, Untrusted(answer.text))
    try:
        wanted = ask(engine_of(models), Score("detector", segments, len(mate.before)))
    except StockadeError as error:  # no token at all, or more than the detector takes
        kind = "too_long" if isinstance(error, TooLong | PromptTooLong) else "empty prompt"
        assert kind in str(answer.screened.error)
        return
    assert answer.screened.error is None
    assert answer.screened.score == pytest.approx(wanted.score, abs=1e-5)
    assert answer.screened.threshold == wanted.threshold


def test_the_screened_score_is_that_of_one_pass_over_the_final_text(bases: dict[str, Model]) -> None:
    @settings(max_examples=14, deadline=None, derandomize=True)
    @given(
        st.sampled_from(list(HEADS)),
        st.sampled_from(WRITERS),
        st.sampled_from(list(CODECS)),
        st.lists(mates, min_size=1, max_size=5),
        st.sampled_from([None, 20]),
        st.sampled_from([7, 64]),
    )
    def holds(kind: str, writer: str, reader: str, many: list[Mate], pages: int | None, budget: int) -> None:
        models = pair(bases, kind, writer, reader)
        engine = engine_of(models, pages, max_batch_tokens=budget, max_sequences=min(budget, 6))
        for answer, mate in screened_and_scored(engine, many, Watched()):
            check(models, answer, mate)

    holds()


@pytest.mark.parametrize("kind", HEADS)
def test_preempted_screens_come_to_the_same_score(bases: dict[str, Model], kind: str) -> None:
    models = pair(bases, kind, "llama", "byte-level")
    many = [Mate(PROSE[n:80] + "no way", n > 2, n, 60, n or None, QUESTION if n % 2 else (), ()) for n in range(6)]
    engine = engine_of(models, 16, max_batch_tokens=20, max_sequences=6)
    watched = Watched()
    for answer, mate in screened_and_scored(engine, many, watched):
        assert answer.screened is not None and answer.screened.error is None
        check(models, answer, mate)
    assert watched.preempted_screens


@pytest.mark.parametrize("kind", HEADS)
def test_roll_backs_over_page_boundaries(bases: dict[str, Model], kind: str) -> None:
    """Every further digit moves the tokens of all digits before it."""
    watched = Watched()
    models = pair(bases, kind, "byte-level", "grouping")
    for pages in (None, 16):
        mates = [
            Mate("7 " * 30 + "1234567890" * 11, True, 0, 200, 1, QUESTION, ()),
            Mate("9876543210" * 15, False, 1, 120, 3, (), ()),
        ]
        engine = engine_of(models, pages, max_sequences=4)
        for answer, mate in screened_and_scored(engine, mates, watched):
            assert len(answer.text) > 100
            check(models, answer, mate)
    assert watched.pages_given_back > 4


@pytest.mark.parametrize("reader", CODECS)
@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n  ", "word   \n", "Grüße, 東京 😀👩\u200d👧 e\u0301", "</s> <|im_end|> <image> [SEP]", PROSE],
    ids=["empty", "blank", "blanks", "blank end", "characters in bytes", "spelled specials", "prose"],
)
def test_texts_that_tokenizers_like_to_change(bases: dict[str, Model], reader: str, text: str) -> None:
    models = pair(bases, "mean in the middle", "byte-level", reader)
    mate = Mate(text, True, 0, 300, 1, QUESTION, ())
    engine = engine_of(models)
    ((answer, _),) = screened_and_scored(engine, [mate], Watched())
    assert answer.text == text and answer.finish_reason == "stop"
    check(models, answer, mate)


def test_chunks_of_one_character_cut_in_bytes_hold_whole_characters_only(bases: dict[str, Model]) -> None:
    models = pair(bases, "last in the middle", "byte-level", "byte-level")
    engine = engine_of(models)
    seen = []
    follow = engine.driver.answers._feed

    def watch(request: Any, run: Any) -> None:
        seen.append(run.screening.text)
        follow(request, run)

    engine.driver.answers._feed = watch  # type: ignore[method-assign]
    text = "😀東ü" * 6
    screened_and_scored(engine, [Mate(text, True, 0, 200, 1, (), ())], Watched())
    assert len(set(seen)) > 10 and all(text.startswith(item) for item in seen)


@pytest.mark.parametrize(
    ("release", "stop_below", "most", "least"),
    [("hold", None, 128, 128), ("audit", None, 128, 128), ("window", None, 40, 32), ("hold", -1.0, 40, 32)],
)
def test_chunks_are_small_only_where_something_waits_for_beginnings(
    bases: dict[str, Model], release: Any, stop_below: float | None, most: int, least: int
) -> None:
    engine = engine_of(pair(bases, "classifier", "byte-level", "byte-level"))
    force(engine, {0: engine.models["mllm"].codec.encode((Untrusted(PROSE * 9),), add_special_tokens=False)[:300]})
    chunks: list[int] = []

    def counted(run: Any, lane: Any, works: list[Any]) -> Any:
        chunks.extend(work.rows for work in works if work.sequence.scored)
        return run(lane, works)

    between(engine, counted)
    screen = Screen("detector", QUESTION, stop_below=stop_below)
    submit(
        engine, asking(Generate("mllm", PROMPT, release=release, screen=screen), []), SamplingParams(max_tokens=300)
    )
    finish(engine)
    first, *others, _ = chunks
    question = len(engine.models["detector"].codec.encode(QUESTION, add_special_tokens=True))
    for chunk in (first - question, *others):
        assert least - 8 <= chunk <= most + 8  # a word may be held back


def test_an_answer_longer_than_the_detector_reads_is_too_long(bases: dict[str, Model]) -> None:
    models = pair(bases, "classifier", "byte-level", "byte-level")
    small = replace(models.models["detector"], context=40)
    models = with_models(models, detector=small)
    mate = Mate("東" * 60, True, 0, 300, 8, (), ())
    ((answer, _),) = screened_and_scored(engine_of(models), [mate], Watched())
    assert answer.screened is not None and answer.screened.error == "too_long"
    with pytest.raises(PromptTooLong):
        ask(engine_of(models), Score("detector", (Untrusted(answer.text),)))


def test_tokens_the_detector_has_no_weights_for_fail_their_own_screen_only(
    bases: dict[str, Model], checkpoint: Callable[[str], Path]
) -> None:
    narrow = load_models(checkpoint("llama-gqa"), checkpoint("classifier"), dtype=torch.float32).models["detector"]
    models = with_models(
        pair(bases, "classifier", "byte-level", "grouping"), detector=replace(narrow, codec=CODECS["grouping"])
    )
    many = [Mate("plain words. " * 3, True, 0, 99, 4, (), ()), Mate("12 345678 " * 3, True, 0, 99, 4, (), ())]
    found = screened_and_scored(engine_of(models), many, Watched())
    errors = {mate.text[:2]: answer.screened.error for answer, mate in found if answer.screened}
    assert errors["pl"] is None
    assert "no weights for" in str(errors["12"])


# --- a head on the answer's own states ---


TARGETS = {"eos": 40, "length": 33, "stop string": 40, "stop token": 40, "one token": 1}


@pytest.fixture(scope="module")
def tapped(checkpoint: Callable[[str], Path]) -> ModelSet:
    models = load_models(checkpoint("llama-gqa"), dtype=torch.float32)
    return with_models(models, probe=probe_on(models.models["mllm"]))


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa"), dtype=torch.float32).eval()


@torch.inference_mode()
def mean_score(reference: Any, models: ModelSet, answer: Answer, left_out: int = 0) -> float:
    """The head on the mean of the answer's own rows in one plain pass of `transformers`."""
    assert answer.stream is not None
    tokens = list(answer.stream.tokens)
    rows = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2][0]
    probe = models.models["probe"].head
    assert probe is not None
    last = len(tokens) - left_out
    return float(probe.score(rows[answer.stream.prompt_tokens : last].mean(0, keepdim=True)))


def tapped_answers(engine: Engine, ends: list[str], chunk: int | None = 3) -> list[tuple[str, Answer]]:
    """Answers to prompts of unequal length, each with its own end."""
    targets: dict[int, list[int]] = {}
    force(engine, targets)
    codec = engine.models["mllm"].codec
    found: list[tuple[str, Answer]] = []

    def loop(number: int, end: str) -> Any:
        prompt = tuple(range(5 + number, 20 + 9 * number))
        answer = yield Generate("mllm", prompt, release="window", screen=Screen("probe", None, chunk=chunk))
        found.append((end, answer))
        return Decision(answer, Outcome.CLEAN)

    for number, end in enumerate(ends):
        params = SamplingParams(
            temperature=1.0,
            seed=number,
            max_tokens={"length": 33, "one token": 1}.get(end, 90),
            ignore_eos=end != "eos",
            stop=("#",) if end == "stop string" else (),
            stop_token_ids=(77,) if end == "stop token" else (),
        )
        request = submit(engine, loop(number, end), params, streaming=True)
        letters = codec.encode((Untrusted("so it goes, on and on; until it ends"),), add_special_tokens=False)
        last = {
            "eos": [2],
            "stop token": [77],
            "stop string": codec.encode((Untrusted("#"),), add_special_tokens=False),
        }
        targets[request.id] = [*letters, *last.get(end, [])]
        if end == "nothing":
            targets[request.id] = [2]
    return found


def check_tapped(reference: Any, models: ModelSet, found: list[tuple[str, Answer]]) -> None:
    for end, answer in found:
        assert answer.screened is not None and answer.screened.error is None
        wanted = mean_score(reference, models, answer, left_out=end in ("eos", "stop token"))
        assert answer.screened.score == pytest.approx(wanted, abs=1e-5), end


@pytest.mark.parametrize(
    ("pages", "budget"), [(None, 64), (None, 6), (14, 64), (14, 6)], ids=["free", "chunks", "tight", "tight chunks"]
)
def test_a_tap_reads_the_mean_over_the_answers_tokens(
    tapped: ModelSet, reference: Any, pages: int | None, budget: int
) -> None:
    engine = engine_of(tapped, pages, max_batch_tokens=budget, max_sequences=6)
    found = tapped_answers(engine, ["eos", "length", "stop string", "stop token", "one token"] * 2)
    finish(engine)
    assert len(found) == 10
    check_tapped(reference, tapped, found)
    assert {answer.finish_reason for end, answer in found if end == "eos"} == {"stop"}
    assert (engine.scheduler.preemptions > 0) == (pages is not None)


@pytest.mark.parametrize("budget", [64, 6])
def test_an_answer_preempted_before_its_closing_row_is_read_whole(
    tapped: ModelSet, reference: Any, budget: int
) -> None:
    engine = engine_of(tapped, max_batch_tokens=budget, max_sequences=6)
    found = tapped_answers(engine, ["length", "stop string"])
    preempted = 0
    while engine.has_work:
        for sequence in list(engine.scheduler.sequences()):
            if sequence.closing and not sequence.record.preemptions:
                engine.scheduler._preempt(sequence)
                engine.pool.clear_cache()
                preempted += 1
        engine.step()
        engine.check_integrity()
    assert preempted == 2
    check_tapped(reference, tapped, found)


@pytest.mark.parametrize("end", ["abort", "crash", "timeout"])
def test_an_answer_that_waits_for_its_closing_row_can_end_otherwise(tapped: ModelSet, end: str) -> None:
    engine = engine_of(tapped)
    found = tapped_answers(engine, ["length"])
    (request,) = engine.driver.requests.values()
    while not any(sequence.closing for sequence in engine.scheduler.sequences()):
        engine.step()
    (sequence,) = engine.scheduler.sequences()
    if end == "abort":
        engine.abort(request.id)
        assert found == []
    else:
        if end == "timeout":
            sequence.deadline = 0.0
        else:
            engine.runner.run = lambda lane, works: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        engine.step()
        ((_, answer),) = found
        assert answer.screened is not None and answer.text
        assert answer.screened.error == ("timeout" if end == "timeout" else "ZeroDivisionError: division by zero")
    finish(engine)


def test_an_answer_without_a_token_has_no_score_from_a_tap(tapped: ModelSet) -> None:
    engine = engine_of(tapped)
    found = tapped_answers(engine, ["eos"])
    (request,) = engine.driver.requests.values()
    force(engine, {request.id: [2]})
    engine.step()
    finish(engine)
    ((_, answer),) = found
    assert answer.text == "" and answer.screened is not None and answer.screened.score != answer.screened.score


def test_a_tap_costs_one_row_and_no_row_where_an_end_token_closes(tapped: ModelSet) -> None:
    for end, more in (("eos", 0), ("length", 1)):
        engine = engine_of(tapped)
        found = tapped_answers(engine, [end])
        (request,) = engine.driver.requests.values()
        finish(engine)
        (_, answer), record = found[0], replied(request).passes[0]
        assert record.computed_tokens == record.prompt_tokens + len(answer.ids) - 1 + more


def test_a_screen_that_cannot_read_along_is_refused(tapped: ModelSet, bases: dict[str, Model]) -> None:
    def loop(screen: Screen) -> Any:
        yield Generate("mllm", PROMPT, screen=screen)

    last = with_models(tapped, probe=detector_on(tapped.models["mllm"], head(2, "last"), "probe"))
    with pytest.raises(InvalidGuard, match="pools the last token"):
        submit(engine_of(last), loop(Screen("probe", None)))
    other = with_models(tapped, detector=bases["detector"])
    with pytest.raises(InvalidGuard, match="states of other weights"):
        submit(engine_of(other), loop(Screen("detector", None)))
    with pytest.raises(InvalidGuard, match="no head"):
        submit(engine_of(tapped), loop(Screen("mllm", ())))
