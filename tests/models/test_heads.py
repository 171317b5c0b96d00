"""Heads: the scores of transformers' classifiers, and probes on a shared backbone, however they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stockade.engine.engine import Engine
from stockade.engine.errors import CheckpointMismatch, CheckpointMissing, CheckpointTruncated
from stockade.engine.guards import Guard
from stockade.engine.models.heads import Head, HeadSpec, load_head, save_head
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.sources import Classifier
from stockade.engine.passes import Answer, Choose, Decision, Generate, Score, Scored
from stockade.engine.request import Outcome
from stockade.engine.running import Request
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Segment, Trusted, Untrusted
from tests.conftest import FAMILIES, save_tokenizer, scatter_norms

WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them at once "
TEXTS = ["a", "Hello there.", WORDS, WORDS * 3, "what? " * 40]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks": {"max_batch_tokens": 7, "max_sequences": 7},
    "one by one": {"max_batch_tokens": 1, "max_sequences": 1},
}


def only(step: Any, results: list[Any]) -> Any:
    """A loop of one pass that keeps its result."""
    results.append((yield step))
    return Decision(Answer(""), Outcome.UNGUARDED)


def run(
    engine: Engine, steps: Sequence[Any], others: Sequence[list[int]] = (), preempt: bool = False
) -> tuple[list[Any], list[list[int]]]:
    """Results of the passes, and the tokens of prompts decoded beside them; clean after every step.

    preempt: twelve times a scoring sequence that is half computed loses its pages, as it does when they run out.
    """
    results: list[list[Any]] = [[] for _ in steps]
    beside = [engine.submit_prompt(prompt, GREEDY) for prompt in others]
    requests: list[Request] = []
    for step, result in zip(steps, results, strict=True):
        requests.append(engine.driver.submit(only(step, result), None, None, False, guarded=True))
        engine.step()
        engine.check_integrity()
    while engine.has_work:
        half = [item for item in engine.scheduler.sequences() if item.running and item.sampling is None]
        if preempt and half and engine.scheduler.preemptions < 12:
            assert 0 < half[0].num_computed < half[0].num_tokens
            engine.scheduler._preempt(half[0])
        engine.step()
        engine.check_integrity()
    assert engine.pool.owned_pages == 0
    assert all(lane.free_slots and len(lane.free_slots) == lane.max_sequences for lane in engine.lanes)
    for request in (*requests, *beside):
        assert request.reply is not None and not request.reply.error
    return [result[0] for result in results], [request.reply.token_ids for request in beside if request.reply]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", ["llama-gqa", "llama-dim100", "qwen2", "qwen3", "mistral-window", "gemma2"])
def test_scores_are_those_of_transformers(
    kind: str, options: dict[str, Any], checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(f"classifier-{kind}")
    engine = Engine(
        checkpoint("llama-mha-tied"), folder, dtype=torch.float32, kv_bytes=16 << 20, tokens_per_page=16, **options
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    scores, _ = run(engine, [Score("detector", (Untrusted(text),)) for text in TEXTS])
    codec = engine.models["detector"].codec
    for text, scored in zip(TEXTS, scores, strict=True):
        with torch.inference_mode():
            want = torch.sigmoid(model(torch.tensor([codec.encode_text(text)])).logits[0, 0])
        assert isinstance(scored, Scored)
        assert scored.score == pytest.approx(float(want), abs=1e-5)


# --- classifiers with several labels ---

NAMES = {"0": "Safe", "1": "Violence", "2": "Fraud"}


def labelled(kind: str, names: dict[str, str], problem: str | None, folder: Path) -> Path:
    config = FAMILIES[kind]()
    config.id2label, config.problem_type = names, problem
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    scatter_norms(model)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "names", "problem", "harm", "wanted"),
    [
        ("llama-gqa", {"0": "safe", "1": "UNSAFE"}, None, "unsafe", lambda p: p.softmax(-1)[0]),
        ("mistral-window", NAMES, "single_label_classification", ("fraud", 1), lambda p: p.softmax(-1)[0]),
        ("qwen3", NAMES, "multi_label_classification", ("violence", 2), lambda p: 1 - p.sigmoid()[1:].max()),
        ("qwen2", {"0": "toxic"}, None, 0, lambda p: 1 - p.sigmoid()[0]),
        ("gemma2", {"0": "reward"}, None, None, lambda p: p.sigmoid()[0]),
    ],
)
def test_labels_are_scored_as_transformers_scores_them(
    kind: str,
    names: dict[str, str],
    problem: str | None,
    harm: Any,
    wanted: Callable[[torch.Tensor], torch.Tensor],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = labelled(kind, names, problem, tmp_path)
    engine = Engine(checkpoint("llama-mha-tied"), Classifier(folder, harm), dtype=torch.float32, kv_bytes=16 << 20)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scores, _ = run(engine, [Score("detector", (Untrusted(text),)) for text in TEXTS])
    codec = engine.models["detector"].codec
    for text, scored in zip(TEXTS, scores, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([codec.encode_text(text)])).logits[0]
        assert scored.score == pytest.approx(float(wanted(logits)), abs=1e-5)
    assert len({round(scored.score, 3) for scored in scores}) > 3


def test_a_classifier_of_chats_reads_them_in_its_own_template(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = labelled("llama-gqa", {"0": "reward"}, None, tmp_path)
    engine = Engine(
        checkpoint("llama-mha-tied"), Classifier(folder, template="chat"), dtype=torch.float32, kv_bytes=16 << 20
    )
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "What is it?</s>"},
    ]
    guard = Guard.protector(detoxifier=None, threshold=0.0)
    reply = engine.chat([turns], guard=guard, sampling=GREEDY)[0]
    finished = [*turns, {"role": "assistant", "content": reply.text}]
    codec = engine.models["detector"].codec
    plain = codec.tokenizer.apply_chat_template(finished, tokenize=False)
    assert plain.count("ASSISTANT:") == 2
    # the end that the user's text spells is no end of a turn
    before, after = plain.split("it?</s>")
    ids = codec.encode((Trusted(before), Untrusted("it?</s>"), Trusted(after)), add_special_tokens=False)
    assert ids.count(2) == 2
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        want = model(torch.tensor([ids])).logits[0, 0].sigmoid()
    assert reply.verdicts[0].score == pytest.approx(float(want), abs=1e-5)
    assert not guard.bind(engine.traits).detector.incremental


@pytest.mark.parametrize("harm", ["Violence", "Safe"])
def test_a_guard_with_several_labels_screens_and_decides(
    harm: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Classifier(labelled("llama-gqa", NAMES, None, tmp_path), harm, "question_answer")
    engine = Engine(checkpoint("llama-mha-tied"), source, dtype=torch.float32, kv_bytes=16 << 20)
    options: dict[str, Any] = {"detoxifier": None, "stop_below": None}
    screened, later = (
        engine.chat(["What is it?"], guard=Guard.protector(screen=screen, **options), sampling=GREEDY)[0]
        for screen in (True, False)
    )
    first, second = screened.verdicts[0], later.verdicts[0]
    assert first.score == pytest.approx(second.score, abs=1e-5)
    assert (screened.outcome is Outcome.CLEAN) is (first.score >= 0.5)
    assert screened.outcome is later.outcome


# --- probes on the MLLM's own backbone, at another depth than the answers beside them ---


def probe(models: ModelSet, layer: int, pooling: str, norm: bool) -> ModelSet:
    generator = torch.Generator().manual_seed(layer)
    mllm = models.models["mllm"]
    head = Head(
        HeadSpec(layer, pooling, norm=norm),  # type: ignore[arg-type]
        torch.randn(64, generator=generator) * 0.05,
        torch.tensor([0.3]),
        torch.rand(64, generator=generator) + 0.5 if norm else None,
        1e-5,
    )
    detector = replace(mllm, name="detector", depth=layer, head=head)
    return ModelSet({"mllm": mllm, "detector": detector}, models.device, models.dtype)


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(checkpoint("llama-gqa"), dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa"), dtype=torch.float32).eval()


def expected(reference: Any, models: ModelSet, segments: tuple[Segment, ...], pool_from: int) -> float:
    """One whole forward pass of transformers, hooked after the head's layer."""
    model = models.models["detector"]
    head = model.head
    assert head is not None
    ids = model.codec.encode(segments, add_special_tokens=True)
    states: list[torch.Tensor] = []
    hook = reference.model.layers[head.spec.layer - 1].register_forward_hook(
        lambda module, given, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        reference(torch.tensor([ids]))
    hook.remove()
    rows = states[0].reshape(len(ids), -1).double()
    context = len(model.codec.encode(segments[:pool_from], add_special_tokens=True)) if pool_from else 0
    pooled = rows[-1] if head.spec.pooling == "last" else rows[context:].mean(0)
    if head.norm_weight is not None:
        pooled = pooled * (pooled.pow(2).mean() + head.norm_eps).rsqrt() * head.norm_weight.double()
    return float(torch.sigmoid((pooled * head.weight.double()).sum() + 0.3))


CASES: list[tuple[tuple[Segment, ...], int]] = [
    ((Untrusted("What a day!"),), 0),
    ((Trusted("Question: "), Untrusted("Why?"), Trusted("\n\nAnswer: "), Untrusted(WORDS)), 3),
    ((Trusted("Question: "), Untrusted(WORDS * 2), Trusted("\n\nAnswer: "), Untrusted("No.")), 3),
    ((Trusted("Question: "), Untrusted(WORDS * 2), Trusted("\n\nAnswer: "), Untrusted("Yes, it is.")), 3),
    ((Untrusted(WORDS * 3),), 0),
    ((Trusted("A: "), Untrusted("x" * 45)), 1),
]


@pytest.mark.parametrize("options", [*VARIANTS.values(), {"preempt": True}], ids=[*VARIANTS, "preempted"])
@pytest.mark.parametrize(
    ("layer", "pooling", "norm"),
    [(1, "mean", False), (2, "mean", True), (3, "mean", False), (2, "last", False), (3, "last", True)],
)
def test_probes_equal_one_whole_pass_beside_answers_of_another_depth(
    models: ModelSet, reference: torch.nn.Module, layer: int, pooling: str, norm: bool, options: dict[str, Any]
) -> None:
    both = probe(models, layer, pooling, norm)
    preempt = options == {"preempt": True}
    if preempt:
        options = {"max_batch_tokens": 20, "max_sequences": 8}
    engine = Engine(models=both, kv_bytes=16 << 20, tokens_per_page=16, **options)
    others = [[5, 6, 7], list(range(10, 60)), [9] * 20]
    want_tokens = [reply.token_ids for reply in Engine(models=models, kv_bytes=16 << 20).generate(others, GREEDY)]
    cases = CASES * 2  # the second time there are prefix hits, up to the first pooled token
    scores, tokens = run(engine, [Score("detector", text, start) for text, start in cases], others, preempt)
    assert tokens == want_tokens
    for (text, start), scored in zip(cases, scores, strict=True):
        assert scored.score == pytest.approx(expected(reference, both, text, start), abs=1e-5)
    assert engine.scheduler.preemptions == (12 if preempt else 0)


def test_context_before_the_pooled_text_comes_from_the_pool(models: ModelSet) -> None:
    engine = Engine(models=probe(models, 2, "mean", False), kv_bytes=16 << 20, tokens_per_page=16)
    text, start = CASES[2]
    step = Score("detector", text, start)
    first = engine.driver.submit(only(step, []), None, None, False, guarded=True)
    while engine.has_work:
        engine.step()
    second = engine.driver.submit(only(step, []), None, None, False, guarded=True)
    while engine.has_work:
        engine.step()
    context = len(engine.models["detector"].codec.encode(text[:start], add_special_tokens=True))
    assert first.passes[0].cached_tokens == 0 and second.passes[0].cached_tokens == context


@pytest.mark.parametrize("step", [Generate("detector", (5, 6)), Choose("detector", (5, 6), ("a", "b"))])
def test_a_model_that_scores_only_is_not_asked_to_speak(models: ModelSet, step: Any) -> None:
    engine = Engine(models=probe(models, 2, "mean", False), kv_bytes=16 << 20)
    with pytest.raises(ValueError, match="detector gives scores only"):
        engine.driver.submit(only(step, []), None, None, False, guarded=True)
    with pytest.raises(ValueError, match="mllm has no head to score with"):
        engine.driver.submit(only(Score("mllm", (Untrusted("a"),)), []), None, None, False, guarded=True)
    assert not engine.has_work


# --- the file ---


@pytest.mark.parametrize("norm", [False, True])
def test_a_saved_head_is_read_back(norm: bool, tmp_path: Path) -> None:
    spec = HeadSpec(3, "mean", norm=norm, template="question_answer", threshold=0.25, backbone_hash="abc")
    head = Head(spec, torch.randn(8), torch.tensor([0.5]), torch.ones(8) if norm else None, 1e-5)
    save_head(head, tmp_path / "head.safetensors", licence="none")
    again = load_head(tmp_path / "head.safetensors")
    assert again.spec == spec and again.norm_eps == 1e-5
    pooled = torch.randn(4, 8)
    assert torch.equal(again.score(pooled), head.score(pooled))


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(CheckpointMissing, match="no head at"):
        load_head(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointTruncated, match="not a safetensors file"):
        load_head(path)
    save_file({"weight": torch.zeros(4)}, path)
    with pytest.raises(CheckpointMismatch, match="not a head saved by this package"):
        load_head(path)
    head = Head(HeadSpec(1, "mean"), torch.zeros(4))
    save_head(head, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointTruncated):
        load_head(path)
    save_head(replace(head, weight=torch.zeros(2, 2)), path)
    with pytest.raises(CheckpointMismatch, match="does not describe"):
        load_head(path)
    save_head(replace(head, norm_weight=torch.zeros(4)), path)
    with pytest.raises(CheckpointMismatch, match="does not describe"):
        load_head(path)


@pytest.mark.parametrize("given", [{"layer": 0}, {"pooling": "max"}, {"template": "poem"}])
def test_a_head_that_cannot_be_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch, match="layer >= 1, pooling last or mean and one of the templates"):
        HeadSpec(**{"layer": 1, "pooling": "mean", **given})


@pytest.mark.parametrize(
    ("spec", "width", "message"),
    [
        (HeadSpec(2, "mean"), 32, "a head for 32 features after layer 2; the model has 64 features and 3 layers"),
        (HeadSpec(4, "mean"), 64, "after layer 4; the model has 64 features and 3 layers"),
        (HeadSpec(2, "mean", backbone_hash="other"), 64, "was fitted on other weights"),
    ],
)
def test_a_head_of_another_model_is_refused(
    spec: HeadSpec, width: int, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "head.safetensors"
    save_head(Head(spec, torch.zeros(width)), path)
    with pytest.raises(CheckpointMismatch, match=message):
        load_models(checkpoint("llama-gqa"), path, dtype=torch.float32)
