"""Guards that are adapters on the answering model: results are those of `peft`, and whose pages serve whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForSequenceClassification

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import InvalidGuard
from stockade.engine.guards import Detoxify, Guard, HarmHead
from stockade.engine.kv_pages import Page
from stockade.engine.models.adapters import read_adapter
from stockade.engine.models.attached import AttachedAdapter
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.sources import Attached
from stockade.engine.passes import Answer, Continue, Decision, Generate, Score, Screen
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.sequence import Sequence
from stockade.engine.text import Trusted, Untrusted
from tests.engine.screened import PAGE, ask, engine_of, finish, replied, submit, with_models
from tests.models.test_attached import INVOCATION, save_lora

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPT = tuple(range(5, 45))


class Family(NamedTuple):
    """Models on one backbone, and the same as `peft` runs them."""

    models: ModelSet
    references: dict[str, PeftModel]


@pytest.fixture(scope="module")
def family(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Family:
    """detector: activated classifier; detoxifier: activated; "plain", "other": LoRA on every token."""
    base = checkpoint("llama-gqa")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("detector", "detoxifier", "plain", "other")}
    with pytest.warns(UserWarning, match="CAUSAL_LM"):
        detector = save_lora(
            base,
            folders["detector"],
            AutoModelForSequenceClassification,
            "SEQ_CLS",
            seed=1,
            alora_invocation_tokens=INVOCATION,
        )
    references = {
        "detector": detector,
        "detoxifier": save_lora(base, folders["detoxifier"], seed=2, alora_invocation_tokens=[310, 311]),
        "plain": save_lora(base, folders["plain"], seed=3),
        "other": save_lora(base, folders["other"], seed=4, target_modules=["v_proj", "down_proj"]),
    }
    models = load_models(base, Attached(folders["detector"]), Attached(folders["detoxifier"]), dtype=torch.float32)
    mllm = models.models["mllm"]
    more = {}
    for name in ("plain", "other"):
        index = mllm.backbone.attach(AttachedAdapter.of(read_adapter(folders[name]), mllm.backbone.decoder))
        more[name] = replace(mllm, name=name, adapter=index)
    return Family(with_models(models, **more), references)


@torch.inference_mode()
def peft_greedy(family: Family, name: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens, each from a whole forward pass."""
    tokens = list(prompt)
    for _ in range(count):
        model = family.references["plain" if name == "mllm" else name]
        if name == "mllm":
            with model.disable_adapter():
                logits = model(input_ids=torch.tensor([tokens])).logits
        else:
            logits = model(input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def peft_score(family: Family, tokens: list[int]) -> float:
    offsets = [len(INVOCATION)]
    return float(family.references["detector"](torch.tensor([tokens]), alora_offsets=offsets).logits.sigmoid())


def test_a_continued_answer_is_scored_as_peft_scores_the_whole(family: Family) -> None:
    engine = engine_of(family.models)
    found: list[Any] = []

    def loop() -> Any:
        answer = yield Generate("mllm", PROMPT)
        scored = yield Score("detector", Continue(answer))
        found.append((answer, scored))
        more = yield Score("detector", Continue(answer, segments=(Untrusted(" Is it harmful?"),)))
        found.append((answer, more))
        return Decision(answer, Outcome.CLEAN)

    request = submit(engine, loop(), LONG)
    finish(engine)
    reply = replied(request)
    assert reply.error is None
    for (answer, scored), record, tail in zip(found, reply.passes[1:], ("", " Is it harmful?"), strict=True):
        extra = engine.models["mllm"].codec.encode((Untrusted(tail),), add_special_tokens=False) if tail else []
        tokens = [*PROMPT, *answer.ids, *extra, *INVOCATION]
        assert scored.score == pytest.approx(peft_score(family, tokens), abs=1e-4)
        # the answer's last token was no input yet when the first score was asked for
        known = len(PROMPT) + len(answer.ids) - (not tail)
        assert (record.cached_tokens, record.prompt_tokens) == (known, len(tokens))
        assert record.computed_tokens == len(tokens) - known


def test_a_detectors_own_text_is_scored_as_peft_does(family: Family) -> None:
    engine = engine_of(family.models)
    codec = engine.models["detector"].codec
    text = (Trusted("Question: why?\n\nAnswer: "), Untrusted("since it is so"))
    wanted = peft_score(family, [*codec.encode(text, add_special_tokens=True), *INVOCATION])
    for _ in range(2):  # the second time from pages of its own
        assert ask(engine, Score("detector", text)).score == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", ["mllm", "detoxifier", "plain", "other"])
def test_what_an_adapted_model_writes_is_what_peft_writes(family: Family, name: str) -> None:
    engine = engine_of(family.models)
    wanted = peft_greedy(family, name, (*PROMPT, *family.models.models[name].invocation), 12)
    for _ in range(2):
        assert list(ask(engine, Generate(name, PROMPT, sampling=SHORT)).ids) == wanted
    ask(engine, Generate("mllm", PROMPT, sampling=SHORT))
    reused = ask(engine, Generate(name, PROMPT, sampling=SHORT))
    assert list(reused.ids) == wanted


def test_all_of_a_backbone_share_a_batch_and_each_is_as_alone(family: Family) -> None:
    names = ["mllm", "detoxifier", "plain", "other", "mllm", "plain"]
    prompts = [tuple(range(5 + n, 30 + 7 * n)) for n in range(len(names))]
    steps = [Generate(name, prompt, sampling=LONG) for name, prompt in zip(names, prompts, strict=True)]
    alone = [ask(engine_of(family.models), step) for step in steps]
    for options in ({}, {"pages": 20}, {"max_batch_tokens": 9}):
        engine = engine_of(family.models, max_sequences=8, **options)
        batches: list[set[str]] = []
        run = engine.runner.run

        def watched(lane: Any, works: Any, run: Any = run, batches: Any = batches) -> Any:
            batches.append({work.sequence.model.name for work in works})
            return run(lane, works)

        engine.runner.run = watched  # type: ignore[method-assign]
        found: list[Answer] = [Answer("")] * len(steps)

        def loop(number: int, found: list[Answer] = found) -> Any:
            found[number] = yield steps[number]
            return Decision(found[number], Outcome.CLEAN)

        for number in range(len(steps)):
            submit(engine, loop(number))
        finish(engine)
        assert [answer.ids for answer in found] == [answer.ids for answer in alone]
        assert max(map(len, batches)) >= 3
        assert bool(engine.scheduler.preemptions) == ("pages" in options)


# --- whose pages serve whom ---


class Origin(NamedTuple):
    """What made the keys and values of a token: position, adapter (None: the base), since when, salt."""

    token: int
    adapter: int | None
    since: int | None


def origins(sequence: Sequence) -> list[Origin]:
    active, out = sequence.adapted_from, []
    for position, token in enumerate(sequence.tokens):
        adapted = active is not None and position >= active
        out.append(Origin(token, sequence.model.adapter if adapted else None, active if adapted else None))
    return out


class Ledger:
    """Who wrote each page, read off the works that ran; a page that serves another must have been written alike."""

    def __init__(self, engine: Engine, salts: dict[int, str | None]) -> None:
        self.engine = engine
        self.written: dict[Page, tuple[str | None, list[Any]]] = {}
        self.served = 0
        run = engine.runner.run

        def watched(lane: Any, works: Any) -> Any:
            for work in works:
                self._check(work.sequence, work.start, salts[work.sequence.order[0]])
            result = run(lane, works)
            for work in works:
                self._write(work.sequence, work.start, work.stop, salts[work.sequence.order[0]])
            return result

        engine.runner.run = watched  # type: ignore[method-assign]
        copy = engine.pool.copy_tokens

        def copied(source: Page, target: Page, tokens: int) -> None:
            salt, rows = self.written[source]
            self.written[target] = (salt, rows[:tokens])
            copy(source, target, tokens)

        engine.pool.copy_tokens = copied  # type: ignore[method-assign]

    @staticmethod
    def _rows(sequence: Sequence) -> list[Any]:
        """For every token what it is, and all that comes before it."""
        images = {
            position: (placed.image.key, position - placed.start)
            for placed in sequence.images
            for position in range(placed.start, placed.stop)
        }
        past, rows = 0, []
        for position, origin in enumerate(origins(sequence)):
            rows.append((origin, images.get(position), past))
            past = hash(rows[-1])
        return rows

    def _write(self, sequence: Sequence, start: int, stop: int, salt: str | None) -> None:
        lines = self._rows(sequence)
        for position in range(start, stop):
            _, rows = self.written.setdefault(sequence.table.pages[position // PAGE], (salt, []))
            assert len(rows) >= position % PAGE
            rows[position % PAGE :] = [lines[position]]

    def _check(self, sequence: Sequence, start: int, salt: str | None) -> None:
        lines = self._rows(sequence)
        for position in range(start):
            owner, rows = self.written[sequence.table.pages[position // PAGE]]
            assert owner == salt and rows[position % PAGE] == lines[position]
            self.served += 1


def test_no_page_serves_another_adapter_another_salt_or_another_beginning(family: Family) -> None:
    engine = engine_of(family.models, max_sequences=8)
    salts: dict[int, str | None] = {}
    ledger = Ledger(engine, salts)
    names = ("mllm", "detoxifier", "plain", "other")
    replies: dict[tuple[str, str | None], list[tuple[int, ...]]] = {}

    def loop(name: str, key: tuple[str, str | None]) -> Any:
        answer = yield Generate(name, PROMPT, sampling=SHORT)
        replies.setdefault(key, []).append(answer.ids)
        if name == "mllm":
            yield Score("detector", Continue(answer))
        longer = yield Generate(name, Continue(answer, segments=(Untrusted("more"),)), sampling=SHORT)
        replies[key].append(longer.ids)
        return Decision(answer, Outcome.CLEAN)

    cached: dict[tuple[str, str | None], list[int]] = {}
    for _, salt, name in itertools.product(range(2), ("a", None), names):
        request = submit(engine, loop(name, (name, salt)), salt=salt)
        salts[request.id] = salt
        finish(engine)
        assert replied(request).error is None
        cached.setdefault((name, salt), []).append(replied(request).passes[0].cached_tokens)
    assert ledger.served > 500
    for name in names:
        assert replies[name, "a"] == replies[name, None]
        assert replies[name, "a"][:2] == replies[name, "a"][2:]
    for salt in ("a", None):  # who may read whose prompt
        assert cached["mllm", salt][0] == 0 and cached["mllm", salt][1] == len(PROMPT) - 1
        assert cached["detoxifier", salt][0] == len(PROMPT)  # the base's, up to the invocation
        assert cached["plain", salt][0] == cached["other", salt][0] == 0
        assert cached["plain", salt][1] == len(PROMPT) - 1


def test_what_an_adapter_wrote_is_continued_by_the_base_from_the_bases_pages_only(family: Family) -> None:
    def loop(found: list[Any], name: str) -> Any:
        answer = yield Generate(name, PROMPT, sampling=SHORT)
        found.append(answer)
        found.append((yield Generate("mllm", Continue(answer), sampling=SHORT)))
        return Decision(answer, Outcome.CLEAN)

    for name in ("plain", "detoxifier"):
        found: list[Any] = []
        request = submit(engine_of(family.models), loop(found, name))
        engine = engine_of(family.models)
        request = submit(engine, loop(found, name))
        finish(engine)
        first, second = found[-2:]
        assert replied(request).error is None
        wanted = ask(engine_of(family.models), Generate("mllm", first.stream.tokens, sampling=SHORT))
        assert second.ids == wanted.ids
        known = len(PROMPT) if name == "detoxifier" else 0
        assert replied(request).passes[1].cached_tokens == known


def test_pages_of_images_serve_the_same_image_only(checkpoint: Callable[[str], Path]) -> None:
    models = load_models(checkpoint("llava"), dtype=torch.float32)
    engine = engine_of(models)
    pictures = [Image.effect_noise((56, 56), 60 + 30 * n).convert("RGB") for n in range(2)]
    salts: dict[int, str | None] = {}
    ledger = Ledger(engine, salts)
    cached = []
    for number in (0, 1, 0):
        parts = [{"type": "image", "image": pictures[number]}, {"type": "text", "text": "What is this thing here?"}]
        request = engine.submit([{"role": "user", "content": parts}], sampling=SHORT)
        salts[request.id] = None
        finish(engine)
        record = replied(request).passes[0]
        cached.append((record.cached_tokens, record.prompt_tokens))
    assert cached[1][0] < 16 + 40 < cached[2][1] and cached[2][0] == cached[2][1] - 1
    assert cached[1][0] < cached[2][0] and ledger.served


def test_a_guard_of_adapters_end_to_end(family: Family) -> None:
    detector = HarmHead(threshold=1.0, template="response")
    guard = Guard(detector, Detoxify(), max_rounds=1)
    engine = engine_of(family.models)
    reply = engine.chat(["Tell me"], guard=guard, sampling=LONG)[0]
    labels = [record.label for record in reply.passes]
    assert labels == ["answer", "score", "rewrite", "score"]
    answer, score, rewrite, again = reply.passes
    assert score.cached_tokens == answer.prompt_tokens + 39 and score.prompt_tokens == answer.prompt_tokens + 40 + 3
    assert again.prompt_tokens < score.prompt_tokens + 40  # the rewrite's own text
    assert [verdict.error for verdict in reply.verdicts] == [None, None]
    assert reply.outcome is Outcome.REFUSED
    speculating = replace(guard, speculate=True)
    other = engine_of(family.models).chat(["Tell me"], guard=speculating, sampling=LONG)[0]
    assert [record.text for record in other.passes if record.label == "rewrite"] == [rewrite.text]


def test_an_activated_detector_cannot_read_along(family: Family) -> None:
    def loop() -> Any:
        yield Generate("mllm", PROMPT, screen=Screen("detector", ()))

    with pytest.raises(InvalidGuard, match="a text that has ended"):
        submit(engine_of(family.models), loop())


@pytest.mark.parametrize("speculate", [True, False])
def test_a_rewrites_prompt_ahead_of_an_activated_adapter_is_the_bases(
    family: Family, checkpoint: Callable[[str], Path], speculate: bool
) -> None:
    models = load_models(checkpoint("llama-gqa"), checkpoint("classifier"), dtype=torch.float32)
    models = with_models(family.models, detector=models.models["detector"])
    guard = Guard(
        HarmHead(template="response", threshold=1.0, chunk=2), Detoxify(), max_rounds=1, speculate=speculate
    )
    engine = engine_of(models)
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)
    request = engine.submit(Chat.single("Tell me"), guard=guard, sampling=params)
    finish(engine)
    (rewrite,) = [record for record in replied(request).passes if record.label == "rewrite"]
    assert rewrite.error is None and (rewrite.cached_tokens > 30) == speculate
