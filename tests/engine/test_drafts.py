"""Drafts change how many steps a text takes, and no token of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.engine.drafts import PromptLookup
from stockade.engine.engine import Engine
from stockade.engine.guards import Detoxify, Guard, HarmHead
from stockade.engine.kv_pages import Page, PrefixRoot
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.request import Reply
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted
from tests.engine.screened import assert_empty, engine_of, finish, force, replied


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(checkpoint("llama-gqa"), dtype=torch.float32)


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Reply]:
    requests = [engine.submit_prompt(one, each) for one, each in zip(prompts, params, strict=True)]
    finish(engine)
    return [replied(request) for request in requests]


def texts_in(engine: Engine) -> Iterator[tuple[int, ...]]:
    """Every text that the prefix index holds, from its root to a leaf."""

    def below(node: Page | PrefixRoot) -> Iterator[tuple[int, ...]]:
        if not node.children:
            yield ()
        for content, child in node.children.items():
            yield from (content + rest for rest in below(child))

    for root in list(engine.pool._roots.values()):
        yield from below(root)


repetitive = st.builds(
    lambda words, times, tail: (words * times + tail)[:150],
    st.lists(st.integers(3, 380), min_size=2, max_size=12),
    st.integers(1, 12),
    st.lists(st.integers(3, 380), max_size=4),
).filter(bool)
samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    max_tokens=st.integers(1, 70),
    stop=st.sampled_from([(), (), ("e",), ("!", "ab")]),
    seed=st.integers(0, 99),
    ignore_eos=st.booleans(),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(repetitive, samplings), min_size=1, max_size=4),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([None, 16]),
    st.sampled_from([5, 64]),
)
def test_no_token_changes(
    models: ModelSet,
    many: list[tuple[list[int], SamplingParams]],
    drafts: int,
    pages: int | None,
    budget: int,
) -> None:
    prompts, params = [one for one, _ in many], [each for _, each in many]
    alone = [run(engine_of(models), [one], [each])[0] for one, each in many]
    engine = engine_of(models, pages, max_batch_tokens=budget, max_sequences=min(4, budget))
    found = run(engine, prompts, [replace(each, draft_tokens=drafts) for each in params])
    for with_drafts, without in zip(found, alone, strict=True):
        assert with_drafts.token_ids == without.token_ids
        assert (with_drafts.text, with_drafts.finish_reason) == (without.text, without.finish_reason)
    known = [tuple(one) + tuple(reply.token_ids) for one, reply in zip(prompts, alone, strict=True)]
    for text in texts_in(engine):
        assert any(whole[: len(text)] == text for whole in known)  # never a draft


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_that_repeats_itself_takes_fewer_steps(models: ModelSet, temperature: float) -> None:
    """The continuation is forced, as no random model copies; whether a draft comes true is still found out."""
    words = torch.randint(3, 380, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    changed = [*words[:18], 7, 8, *words[20:]]
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=40, ignore_eos=True)
    taken = {}
    for drafts in (0, 1, 4, 8):
        engine = engine_of(models)
        force(engine, {0: changed})
        (reply,) = run(engine, [[*words, 5]], [replace(params, draft_tokens=drafts)])
        assert reply.token_ids == changed
        taken[drafts] = engine.steps
        (record,) = reply.passes
        assert record.accepted <= record.drafted and (record.accepted > 0) == (drafts > 0)
    assert taken[0] > taken[1] > taken[4] >= taken[8]
    assert taken[0] >= 1.8 * taken[8]


def test_preempted_drafts(models: ModelSet) -> None:
    prompts = [list(range(5 + n, 60 + n)) * 2 for n in range(4)]
    params = [SamplingParams(temperature=0.2 * n, seed=n, max_tokens=60, ignore_eos=True) for n in range(4)]
    plain = run(engine_of(models), prompts, params)
    engine = engine_of(models, 20, max_sequences=4)
    found = run(engine, prompts, [replace(each, draft_tokens=8) for each in params])
    assert [reply.token_ids for reply in found] == [reply.token_ids for reply in plain]
    assert engine.scheduler.preemptions


def test_drafts_take_no_rows_from_others_and_never_more_than_are_free(models: ModelSet) -> None:
    engine = engine_of(models, max_sequences=24, max_batch_tokens=24)
    rows: list[tuple[int, int]] = []
    inner = engine.runner.run

    def watched(lane: Any, works: Any) -> Any:
        rows.append((sum(work.length for work in works), sum(work.rows for work in works)))
        return inner(lane, works)

    engine.runner.run = watched  # type: ignore[method-assign]
    prompts = [[n, n + 1] * 6 for n in range(5, 25)]
    run(engine, prompts, [SamplingParams(max_tokens=40, ignore_eos=True, draft_tokens=8)] * 20)
    (lane,) = engine.lanes
    assert any(every > known for known, every in rows)
    assert all(every <= lane.free_rows or every == known for known, every in rows)


def test_a_screened_answer_with_drafts_scores_the_same(checkpoint: Callable[[str], Path]) -> None:
    models = load_models(checkpoint("llama-gqa"), checkpoint("classifier"), dtype=torch.float32)
    guard = Guard(HarmHead(template="response", chunk=4, threshold=0.0))
    found = []
    for drafts in (0, 8):
        engine = engine_of(models)
        words = engine.models["mllm"].codec.encode((Untrusted("on and on we go " * 9),), add_special_tokens=False)
        force(engine, {0: words})
        params = SamplingParams(max_tokens=60, ignore_eos=True, draft_tokens=drafts)
        pieces = []
        stream = engine.stream("Hi", guard=guard, sampling=params, release="window")
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as stop:
                reply = stop.value
                break
        assert "".join(map(str, pieces)) == reply.text and engine.driver.unscreened_characters == 0
        found.append((reply.text, reply.token_ids, pytest.approx(reply.verdicts[0].score, abs=1e-5)))
        assert (reply.passes[0].accepted > 10) == (drafts > 0)
    assert found[0] == (*found[1][:2], found[1][2].expected)


def test_a_rewrite_is_drafted_from_the_answer(checkpoint: Callable[[str], Path]) -> None:
    models = load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )
    texts = []
    for drafts in (0, 8):
        guard = Guard(HarmHead(template="response", threshold=1.0), Detoxify(draft_tokens=drafts))
        engine = engine_of(models)
        reply = engine.chat(["Hi"], guard=guard, sampling=SamplingParams(max_tokens=90, ignore_eos=True))[0]
        assert_empty(engine)
        (rewrite,) = [record for record in reply.passes if record.label == "rewrite"]
        texts.append(rewrite.token_ids)
        assert (rewrite.drafted > 0) == (drafts > 0)
    assert texts[0] == texts[1]


# --- the lookup ---


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_a_guess_is_what_followed_the_same_words_before(text: list[int], most: int, room: int) -> None:
    lookup = PromptLookup(most)
    for end in range(1, len(text) + 1):
        guess = lookup.propose(text[:end], room)
        assert len(guess) <= min(most, room)
        if guess:
            places = [at for at in range(2, end) if text[at - 2 : at] == text[end - 2 : end]]
            assert any(text[at : min(end, at + len(guess))] == guess for at in places)


def test_guessing_pauses_where_it_does_not_pay() -> None:
    lookup = PromptLookup(8)
    text = [1, 2, 3] * 4
    tried = 0
    while guess := lookup.propose(text, 50):
        lookup.learn(len(guess), 0, len(text))
        text += [1, 2, 3]
        tried += 1
        assert tried < 20
    quiet = 0
    while not lookup.propose(text, 50):
        text += [1, 2, 3]
        quiet += 3
        assert quiet < 60
    assert quiet >= 20 and lookup.accepted == 0 and lookup.proposed >= tried
    lookup.learn(1, 1, len(text))
    assert len(lookup.propose(text, 50)) == 2  # and grows again where it does


def test_one_token_is_enough_close_behind_a_copy() -> None:
    original = list(range(100, 140))
    lookup = PromptLookup(8)
    text = [*original, 7, 100, 101]
    assert lookup.propose(text, 20) == original[2:10]
    text += [102, 103, 104, 8]  # three came true, then something else was said
    lookup.learn(8, 3, len(text))
    assert lookup.propose(text, 20) == []
    assert lookup.propose([*text, 9, 112], 20) == original[13:15]  # two guesses: the reason is a weak one
    assert lookup.propose([*text, 9, 112, 10, 130], 20) == []  # too far away
    lookup.learn(2, 2, len(text) + 4)
    assert lookup.propose([*text, 9, 112, 10, 130, 113, 114], 20) == original[15:23]
