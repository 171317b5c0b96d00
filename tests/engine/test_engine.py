"""What must not matter: who else is in the batch, chunks, hits, preemption, aborts; and streams, stops and seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image
from transformers import AutoModelForCausalLM

from stockade.engine.engine import Engine, Request
from stockade.engine.guards import Guard
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.request import FinishReason, Outcome, Reply
from stockade.engine.sampling import SamplingParams

PAGE = 16
DEFAULT: dict[str, Any] = {"kv_bytes": 16 << 20, "tokens_per_page": PAGE}


@pytest.fixture(scope="module")
def text_models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(checkpoint("llama-gqa"), dtype=torch.float32)


@pytest.fixture(scope="module")
def all_models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(
        checkpoint("llava"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )


def new(models: ModelSet, **options: Any) -> Engine:
    return Engine(models=models, **{**DEFAULT, **options})


def tight(models: ModelSet, pages: int) -> int:
    """kv_bytes for so many pages of the largest layout."""
    return pages * max(model.layout(PAGE).page_bytes for model in models.models.values())


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    head = torch.randint(3, 380, (shared,), generator=generator).tolist()
    lengths = [1, 2, 15, 16, 17, 31, 33, 48, 70, 130]
    return [head + torch.randint(3, 380, (lengths[n % 10],), generator=generator).tolist() for n in range(count)]


def tokens(replies: list[Reply]) -> list[list[int]]:
    return [reply.token_ids for reply in replies]


MIXED = [
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=6, max_tokens=20, ignore_eos=True),
]


def run_mixed(engine: Engine, many: list[list[int]]) -> list[list[int]]:
    """All at once, greedy and sampled ones beside each other; the pool must be clean after every step."""
    requests = [engine.submit_prompt(one, MIXED[n % 3]) for n, one in enumerate(many)]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert engine.pool.owned_pages == 0
    replies = [request.reply for request in requests]
    assert not [reply.error for reply in replies if reply is None or reply.error]
    return tokens([reply for reply in replies if reply is not None])


@pytest.fixture(scope="module")
def alone(text_models: ModelSet) -> list[list[int]]:
    """Each prompt by itself, in an engine that knows nothing."""
    out = []
    for number, one in enumerate(prompts(10, shared=20)):
        engine = new(text_models)
        out += run_mixed_one(engine, one, number)
    return out


def run_mixed_one(engine: Engine, one: list[int], number: int) -> list[list[int]]:
    return tokens(engine.generate([one], MIXED[number % 3]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 7, "max_sequences": 4},
        {"max_batch_tokens": 1, "max_sequences": 1},
        {"tokens_per_page": 64},
        {"max_batch_tokens": 33, "max_sequences": 10, "tokens_per_page": 32},
    ],
    ids=["many", "chunks of 7", "one token a step", "large pages", "chunks across pages"],
)
def test_batches_chunks_and_pages_change_no_token(
    text_models: ModelSet, alone: list[list[int]], options: dict[str, Any]
) -> None:
    assert run_mixed(new(text_models, **options), prompts(10, shared=20)) == alone


def test_a_hit_gives_what_a_miss_gives(text_models: ModelSet, alone: list[list[int]]) -> None:
    engine = new(text_models)
    many = prompts(10, shared=20)
    assert run_mixed(engine, many) == alone
    assert run_mixed(engine, many) == alone  # everything but the last token comes from the pool
    replies = engine.generate(many, MIXED[0])
    assert [reply.passes[0].cached_tokens for reply in replies] == [len(one) - 1 for one in many]
    engine.pool.clear_cache()
    assert engine.pool.cached_pages == 0
    reply = engine.generate(many[:1], MIXED[0])[0]
    assert reply.passes[0].cached_tokens == 0 and reply.token_ids == alone[0]


@pytest.mark.parametrize("known", [1, 15, 16, 17, 31, 32, 40])
def test_hits_are_exact_to_the_token(text_models: ModelSet, known: int) -> None:
    base = prompts(1)[0] + prompts(10)[9][:40]
    engine = new(text_models)
    engine.generate([base], MIXED[0])
    other = [*base[:known], 7 if base[known] != 7 else 8, 9, 10]
    reply = engine.generate([other], MIXED[0])[0]
    assert reply.passes[0].cached_tokens == known
    assert reply.token_ids == new(text_models).generate([other], MIXED[0])[0].token_ids


def test_generated_text_is_found_again_by_the_next_turn(text_models: ModelSet) -> None:
    engine = new(text_models)
    first = prompts(10)[5]
    reply = engine.generate([first], MIXED[0])[0]
    longer = [*first, *reply.token_ids, 9, 9]
    second = engine.generate([longer], MIXED[0])[0]
    # the last token was sampled, but never an input
    assert second.passes[0].cached_tokens == len(first) + len(reply.token_ids) - 1
    assert second.token_ids == new(text_models).generate([longer], MIXED[0])[0].token_ids


def test_preemption_changes_no_token(text_models: ModelSet, alone: list[list[int]]) -> None:
    engine = new(text_models, kv_bytes=tight(text_models, 12), max_batch_tokens=40, max_sequences=8)
    assert run_mixed(engine, prompts(10, shared=20)) == alone
    assert engine.scheduler.preemptions > 0


def test_salts_share_nothing(text_models: ModelSet) -> None:
    engine = new(text_models)
    cached = []
    for salt in ("a", "a", "b", None, "b"):
        request = engine.submit("the very same question, long enough for a page", salt=salt, sampling=MIXED[0])
        while request.reply is None:
            engine.step()
        cached.append(request.reply.passes[0].cached_tokens > 0)
    assert cached == [False, True, False, False, True]


def test_seeds(text_models: ModelSet) -> None:
    def run(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=30, ignore_eos=True)
        return engine.generate([[5, 6, 7]], params)[0].token_ids

    engine = new(text_models)
    assert run(1) == run(1) != run(2)
    assert run(None) != run(None)


def test_equal_weights_under_other_rotary_settings_share_no_pages(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint("llama-gqa"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (folder / "config.json").write_text(json.dumps(config))
    models = load_models(checkpoint("llama-gqa"), detoxifier=folder, dtype=torch.float32)
    swapped = {"mllm": models.models["detoxifier"], "detoxifier": models.models["mllm"]}
    first, second = new(models), new(ModelSet(swapped, models.device, models.dtype))
    second.pool = second.scheduler.pool = second.runner.pool = first.pool
    second.runner._decoding.clear()  # which knows the pool it had
    prompt = prompts(10)[9]
    for engine, source in ((first, checkpoint("llama-gqa")), (second, folder)):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        want = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=2)[0, 130:]
        assert engine.generate([prompt], MIXED[0])[0].token_ids == want.tolist()


# --- streams, stops, reasons ---


def streamed(engine: Engine, question: str, **options: Any) -> tuple[list[str], Reply]:
    pieces = []
    stream = engine.stream(question, **options)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def test_a_streams_pieces_are_its_text(text_models: ModelSet) -> None:
    engine = new(text_models)
    for seed in range(4):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True)
        pieces, reply = streamed(engine, "Hi", sampling=params)
        assert "".join(pieces) == reply.text == engine.models["mllm"].codec.decode(reply.token_ids)
        assert len(pieces) > 5 and all(pieces)


def test_a_guarded_stream_shows_nothing_before_the_verdict(all_models: ModelSet) -> None:
    engine = new(all_models)
    for threshold, outcome in ((0.0, Outcome.CLEAN), (1.0, Outcome.REFUSED)):
        guard = Guard.protector(template="response", threshold=threshold, max_rounds=0)
        stream = engine.stream("Hi", guard=guard, sampling=MIXED[0])
        first = next(stream)
        assert not engine.has_work  # all verdicts are in before anything leaves
        assert list(stream) == []
        reply = engine.chat(["Hi"], guard=guard, sampling=MIXED[0])[0]
        assert (reply.text, reply.outcome) == (first, outcome)
    assert first == guard.refusal


def test_closing_a_stream_aborts_it(text_models: ModelSet) -> None:
    engine = new(text_models)
    stream = engine.stream("Hi", sampling=SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert engine.has_work and engine.pool.owned_pages
    stream.close()
    assert not engine.has_work and engine.pool.owned_pages == 0
    engine.check_integrity()


def test_two_streams_and_a_chat_at_once(text_models: ModelSet) -> None:
    engine = new(text_models)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    questions = ["one", "two"]
    want = [reply.text for reply in engine.chat(questions, sampling=params)]
    streams = [engine.stream(question, sampling=params) for question in questions]
    texts = ["", ""]
    for _ in range(5):
        for number, stream in enumerate(streams):
            texts[number] += next(stream)
    assert [reply.text for reply in engine.chat(questions, sampling=params)] == want
    for number, stream in enumerate(streams):
        texts[number] += "".join(stream)
    assert texts == want


def test_stop_strings_end_the_text_and_never_leak(text_models: ModelSet) -> None:
    engine = new(text_models)
    whole = engine.chat(["Hi"], sampling=SamplingParams(max_tokens=60, ignore_eos=True))[0]
    tried = 0
    for start in range(4, len(whole.text) - 3, 5):
        stop = whole.text[start : start + 3]
        params = SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop, "never in it, surely"))
        pieces, reply = streamed(engine, "Hi", sampling=params)
        assert "".join(pieces) == reply.text == whole.text[: whole.text.index(stop)]
        assert reply.finish_reason is FinishReason.STOP
        assert len(reply.token_ids) < len(whole.token_ids) or whole.text.endswith(stop)
        tried += 1
    assert tried > 3


def test_stop_tokens_end_tokens_and_limits(text_models: ModelSet) -> None:
    engine = new(text_models)
    codec = engine.models["mllm"].codec
    free = engine.generate([[5, 6]], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    assert free.finish_reason is FinishReason.LENGTH and len(free.token_ids) == 40
    token = free.token_ids[7]
    place = free.token_ids.index(token)
    ended = engine.generate([[5, 6]], SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(token,)))[0]
    assert ended.token_ids == free.token_ids[: place + 1] and ended.finish_reason is FinishReason.STOP
    assert ended.text == codec.decode(free.token_ids[:place])
    longest = engine.generate([[5, 6]], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(longest.token_ids) == 510 and longest.finish_reason is FinishReason.LENGTH  # the context of 512
    assert longest.token_ids[:40] == free.token_ids
    bounded = engine.generate([[5, 6], [5] * 30], SamplingParams(max_tokens=40, max_length=20, ignore_eos=True))
    assert [len(reply.token_ids) for reply in bounded] == [18, 1]


def test_an_end_token_ends_unless_ignored(text_models: ModelSet) -> None:
    engine = new(text_models)
    params = {"temperature": 1.5, "max_tokens": 300}
    eos = engine.models["mllm"].codec.eos_ids
    for seed in range(40):
        reply = engine.generate([[5, 6]], SamplingParams(seed=seed, **params))[0]  # type: ignore[arg-type]
        if reply.finish_reason is FinishReason.STOP:
            break
    assert reply.token_ids[-1] in eos and not eos.intersection(reply.token_ids[:-1])
    more = engine.generate([[5, 6]], SamplingParams(seed=seed, ignore_eos=True, **params))[0]  # type: ignore[arg-type]
    assert more.token_ids[: len(reply.token_ids)] == reply.token_ids and len(more.token_ids) == 300


def test_logprobs_come_with_every_token(text_models: ModelSet) -> None:
    engine = new(text_models)
    reply = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3))[0]
    assert reply.logprobs is not None and len(reply.logprobs) == 6
    for token, row in zip(reply.token_ids, reply.logprobs, strict=True):
        (chosen, value), *top = row
        assert chosen == token and len(top) == 3
        assert top[0] == (token, value)  # greedy: the chosen one is the likeliest
        assert [item[1] for item in top] == sorted((item[1] for item in top), reverse=True)
    assert engine.generate([[5, 6, 7]], MIXED[0])[0].logprobs is None


def test_usage_and_trace_add_up(all_models: ModelSet) -> None:
    engine = new(all_models)
    guard = Guard.protector(template="response", threshold=1.0, max_rounds=2)
    reply = engine.chat(["A question"], guard=guard, sampling=MIXED[0])[0]
    labels = [record.label for record in reply.passes]
    assert labels == ["answer", "screen", "rewrite", "screen", "rewrite", "screen"]
    for name, usage in reply.usage.items():
        records = [record for record in reply.passes if record.model == name]
        assert usage.prompt == sum(record.prompt_tokens for record in records)
        assert usage.cached == sum(record.cached_tokens for record in records)
        assert usage.generated == sum(len(record.token_ids) for record in records)
    assert 0 < reply.trace.answer < reply.trace.total
    assert reply.trace.guard == pytest.approx(reply.trace.total - reply.trace.answer)
    for record in reply.passes:
        assert record.started is not None and record.finished is not None
        assert record.submitted <= record.started <= record.finished


def test_two_engines_share_models_and_nothing_else(text_models: ModelSet) -> None:
    one, two = new(text_models), new(text_models)
    first = one.submit_prompt([5, 6], MIXED[0])
    second = two.submit_prompt([5, 6], MIXED[0])
    while first.reply is None or second.reply is None:
        one.step()
        two.step()
    assert first.reply.token_ids == second.reply.token_ids


# --- any interleaving ---

PICTURES = [Image.effect_noise((56, 56), 60 + 30 * n).convert("RGB") for n in range(2)]
TEXTS = ["Hi", "What is this?", "What is this thing, and what was it before it became what it is?"]
GUARDS: list[Guard | None] = [
    None,
    Guard.protector(template="response", threshold=0.5, max_rounds=1),
    Guard.protector(template="question_answer", threshold=1.0, max_rounds=2),
    Guard.ecso(threshold=0.0),
    Guard.ecso(published=True),
]
SHORT = [
    SamplingParams(max_tokens=3, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=1.0, seed=3),
    SamplingParams(max_tokens=20),
]


class Interleaving(RuleBasedStateMachine):
    """Submits, steps and aborts in any order, under memory pressure or not."""

    models: ModelSet

    @initialize(pages=st.sampled_from([30, 200]), budget=st.sampled_from([8, 50]))
    def start(self, pages: int, budget: int) -> None:
        self.engine = new(
            self.models, kv_bytes=tight(self.models, pages), max_batch_tokens=budget, max_sequences=budget
        )
        self.requests: list[Request] = []

    @rule(
        text=st.sampled_from(TEXTS),
        picture=st.sampled_from([None, 0, 1]),
        guard=st.sampled_from(GUARDS),
        params=st.sampled_from(SHORT),
        streaming=st.booleans(),
    )
    def submit(
        self, text: str, picture: int | None, guard: Guard | None, params: SamplingParams, streaming: bool
    ) -> None:
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if picture is not None:
            parts.insert(0, {"type": "image", "image": PICTURES[picture]})
        chat = [{"role": "user", "content": parts}]
        self.requests.append(self.engine.submit(chat, guard=guard, sampling=params, streaming=streaming))

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.check_integrity()

    @precondition(lambda self: self.engine.driver.requests)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        live = [request for request in self.requests if request.reply is None]
        reply = self.engine.abort(live[which % len(live)].id)
        assert reply.finish_reason is FinishReason.ABORTED and reply.text == ""

    @rule()
    def forget(self) -> None:
        self.engine.pool.clear_cache()

    @invariant()
    def the_pool_is_clean(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.engine.step()
            self.engine.check_integrity()
        assert all(request.reply is not None for request in self.requests)
        assert self.engine.pool.owned_pages == 0
        for lane in self.engine.lanes:
            assert not lane.running and not lane.waiting
            assert len(lane.free_slots) == lane.max_sequences


@pytest.mark.slow
def test_any_interleaving_leaves_the_pool_clean_and_every_request_with_a_reply(all_models: ModelSet) -> None:
    machine = type("Machine", (Interleaving,), {"models": all_models})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=15, stateful_step_count=16, deadline=None, database=None)
    )
