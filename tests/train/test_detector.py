"""Training a detector: it learns, goes on where it was interrupted, and scores in the engine as in `peft`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, CheckpointMismatch
from stockade.engine.guards import Guard, HarmHead
from stockade.engine.guards.prompts import detector_text
from stockade.engine.models.heads import load_head
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import Attached
from stockade.engine.passes import Answer, Decision, Score
from stockade.engine.request import Outcome
from stockade.train.data import Example, Kind, Part, Source
from stockade.train.detector import DetectorUnfit, Form, check_refusals, train_detector
from stockade.train.detector_card import DetectorCard
from stockade.train.loop import AnotherRun
from stockade.train.readings import Reading, conversation_reading, pool, text_reading
from stockade.train.recipe import Recipe
from stockade.train.rows import DataInvalid

QUICK = Recipe(rate=2e-3, head_rate=2e-2, epochs=1, batch=8, max_tokens=48, rank=4, alpha=8)
MEAN = Form(template="question_answer", layer=2, pooling="mean", beginnings=0.5, false_positives=0.05)
TEXTS = [("Why?", "abcde fghab cdefg"), ("Tell me of 7", "stuvw xyzst " * 12), ("What?", "01234")]


@pytest.fixture(scope="module")
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama-gqa")


@pytest.fixture(scope="module")
def toy(make_data: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("toy"))
    for file in (folder / "xstest").iterdir():  # whose answers the model would have to give first
        file.unlink()
    (folder / "xstest").rmdir()
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DetectorCard]:
    out = tmp_path_factory.mktemp("trained") / "det"
    return out, train_detector(base, toy, out, form=MEAN, recipe=QUICK)


class ScoreAll:
    """A guard whose loop scores texts in a template."""

    def __init__(self, texts: list[tuple[str, str]], template: str) -> None:
        self.texts, self.template = texts, template
        self.scores: list[float] = []

    def run(self, chat: Chat, traits: object, release: str = "verdict") -> object:
        for question, answer in self.texts:
            text = detector_text(self.template, question, answer)
            self.scores.append((yield Score("detector", text.segments, text.pool_from)).score)
        return Decision(Answer(""), Outcome.CLEAN)


def engine_scores(engine: Engine, texts: list[tuple[str, str]], template: str) -> list[float]:
    guard = ScoreAll(texts, template)
    engine.chat(["?"], guard=guard)
    return guard.scores


@torch.inference_mode()
def peft_scores(base: Path, out: Path, texts: list[tuple[str, str]], template: str) -> list[float]:
    """The same from `peft` on the whole base, text by text."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    codec = load_models(base).models["mllm"].codec
    head = load_head(out / "head.safetensors")
    scores = []
    for question, answer in texts:
        reading = text_reading(codec, template, question, answer, 512)
        states = model(torch.tensor([reading.tokens]), output_hidden_states=True).hidden_states[head.spec.layer]
        pooled = states[:, reading.pool_from :].mean(1) if head.spec.pooling == "mean" else states[:, -1]
        scores.append(float(torch.sigmoid(pooled @ head.weight + head.bias)))
    return scores


def test_it_learns_and_the_folder_holds_what_the_card_says(trained: tuple[Path, DetectorCard]) -> None:
    out, card = trained
    assert card.test.auroc > 0.95 and card.skipped == 0
    spec = load_head(out / "head.safetensors").spec
    assert spec == card.spec and (spec.layer, spec.pooling, spec.template) == (2, "mean", "question_answer")
    assert spec.threshold == 0.5 and spec.prefix_threshold is not None
    page = (out / "README.md").read_text()
    assert page == card.to_markdown() and f"{card.test.auroc:.4f}" in page
    assert not (out / ".work").exists()


@pytest.mark.parametrize("how", ["merged", "attached"])
def test_the_engine_scores_as_peft_does(how: str, base: Path, trained: tuple[Path, DetectorCard]) -> None:
    out, card = trained
    detector = (out, base) if how == "merged" else Attached(out)
    engine = Engine(base, detector, device="cpu", dtype=torch.float32, kv_bytes=32 << 20)
    assert engine.models["detector"].depth == 2
    assert engine.traits["detector"].template == card.spec.template
    bound = Guard.protector(detoxifier=None).bind(engine.traits).detector
    assert isinstance(bound, HarmHead) and bound.template == "question_answer"
    found = engine_scores(engine, TEXTS, card.spec.template)
    assert found == pytest.approx(peft_scores(base, out, TEXTS, card.spec.template), abs=1e-4)
    assert max(found) - min(found) > 0.05


def test_the_published_form_on_an_activated_adapter(base: Path, toy: Path, tmp_path: Path) -> None:
    """Last layer, last token, normed; the engine appends the invocation and reuses the answer's own states."""
    form = Form(invocation=" !guard")
    card = train_detector(base, toy, tmp_path / "det", form=form, recipe=replace(QUICK, adapter="alora"))
    assert (card.spec.layer, card.spec.pooling, card.spec.norm, card.spec.prefix_threshold) == (3, "last", True, None)
    engine = Engine(base, Attached(tmp_path / "det"), device="cpu", dtype=torch.float32, kv_bytes=32 << 20)
    codec = engine.models["detector"].codec
    invocation = codec.encode_text(" !guard", False)
    assert engine.models["detector"].invocation == tuple(invocation)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "det").eval()
    head = load_head(tmp_path / "det" / "head.safetensors")
    wanted = []
    for _, answer in TEXTS:
        tokens = [*codec.encode_text(answer), *invocation]
        with torch.inference_mode():
            out = model(torch.tensor([tokens]), output_hidden_states=True, alora_offsets=[len(invocation)])
        # `transformers` has normed its last hidden state
        wanted.append(float(torch.sigmoid(out.hidden_states[-1][0, -1] @ head.weight + head.bias)))
    assert engine_scores(engine, TEXTS, "response") == pytest.approx(wanted, abs=1e-4)
    (reply,) = engine.chat(["Tell me."], guard=Guard.protector(detoxifier=None))
    score = next(record for record in reply.passes if record.label == "score")
    assert score.cached_tokens > 0 and score.computed_tokens == score.prompt_tokens - score.cached_tokens
    assert [record.label for record in reply.passes] == ["answer", "score"]


def test_all_weights_trained_make_a_checkpoint_of_their_own(base: Path, toy: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, adapter="full", rate=1e-3, batch=4)
    card = train_detector(base, toy, tmp_path / "det", form=Form(pairwise=True), recipe=recipe, limit=12)
    third = len(card.losses) // 3
    assert sum(card.losses[-third:]) < 0.8 * sum(card.losses[:third])
    engine = Engine(base, tmp_path / "det", device="cpu", dtype=torch.float32, kv_bytes=32 << 20)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "det").eval()
    head = load_head(tmp_path / "det" / "head.safetensors")
    assert head.spec.backbone_hash == engine.models["detector"].backbone.content_hash
    codec = engine.models["detector"].codec
    wanted = []
    for _, answer in TEXTS:
        with torch.inference_mode():
            states = model(torch.tensor([codec.encode_text(answer)]), output_hidden_states=True).hidden_states[-1]
        wanted.append(float(torch.sigmoid(states[0, -1] @ head.weight + head.bias)))
    assert engine_scores(engine, TEXTS, "response") == pytest.approx(wanted, abs=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("adapter", ["lora", "alora"])
def test_an_interrupted_run_goes_on_to_the_same_bits(adapter: str, base: Path, toy: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, adapter=adapter, epochs=2, batch=16)
    form = Form(layer=2)

    def interrupt(what: str, done: int, of: int) -> None:
        if what == "training" and done == of // 2 + 1:
            raise Interrupted

    def run(out: Path, progress=None) -> DetectorCard:
        return train_detector(base, toy, out, form=form, recipe=recipe, limit=8, progress=progress, save_seconds=0.0)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", interrupt)
    with pytest.raises(AnotherRun):
        train_detector(base, toy, tmp_path / "parts", form=form, recipe=replace(recipe, rate=1e-3), limit=8)
    steps: list[int] = []
    parts = run(tmp_path / "parts", lambda what, done, of: steps.append(done) if what == "training" else None)
    assert steps[0] > len(whole.losses) // 2
    assert parts == whole
    for name in ("adapter_model.safetensors", "head.safetensors"):
        one, other = load_file(tmp_path / "parts" / name), load_file(tmp_path / "whole" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(BadInput, match="not empty"):
        run(tmp_path / "whole")


def test_a_finished_detector_goes_on_from_another_with_the_questions_that_chose_it(
    base: Path, toy: Path, trained: tuple[Path, DetectorCard], tmp_path: Path
) -> None:
    start, before = trained
    card = train_detector(base, toy, tmp_path / "det", start=start, form=replace(MEAN, finish=True), recipe=QUICK)
    assert card.test.auroc > 0.95
    counts = {part: sum(n for (_, its, _), n in card.sizes.items() if its is part) for part in Part}
    known = {part: sum(n for (_, its, _), n in before.sizes.items() if its is part) for part in Part}
    left = sum(n for (_, its, kind), n in before.sizes.items() if its is Part.VALIDATION and kind is Kind.HELPFUL)
    assert counts[Part.TRAIN] == 2 * (known[Part.VALIDATION] - left) and counts[Part.TEST] == known[Part.TEST]
    assert counts[Part.VALIDATION] == left and card.validation is None
    assert "Goes on from det" in card.to_markdown() and "\n| validation |" not in card.to_markdown()


def test_a_run_begins_with_the_weights_that_it_goes_on_from(
    base: Path, toy: Path, trained: tuple[Path, DetectorCard], tmp_path: Path
) -> None:
    still = replace(QUICK, rate=1e-12, head_rate=1e-12)
    train_detector(base, toy, tmp_path / "det", start=trained[0], form=MEAN, recipe=still, limit=8)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained[0], tmp_path / "det"))
    assert all(torch.allclose(after[name], value, atol=1e-7) for name, value in before.items())
    weight, same = (load_head(folder / "head.safetensors").weight for folder in (trained[0], tmp_path / "det"))
    assert torch.allclose(same, weight, atol=1e-6)


def test_a_run_goes_on_from_its_like_alone(
    base: Path, toy: Path, trained: tuple[Path, DetectorCard], tmp_path: Path
) -> None:
    for form, recipe, words in (
        (MEAN, replace(QUICK, rank=8), "another rank"),
        (replace(MEAN, layer=1), QUICK, "another layer"),
        (MEAN, replace(QUICK, adapter="full"), "only a LoRA"),
    ):
        with pytest.raises(BadInput, match=words):
            train_detector(base, toy, tmp_path / words, start=trained[0], form=form, recipe=recipe)
    with pytest.raises(BadInput, match="finished from a start"):
        train_detector(base, toy, tmp_path / "none", form=replace(MEAN, finish=True), recipe=QUICK)


def test_a_head_refuses_weights_it_was_not_trained_with(
    checkpoint: Callable[[str], Path], trained: tuple[Path, DetectorCard]
) -> None:
    other = checkpoint("llama3-rope")
    for detector in ((trained[0], other), Attached(trained[0])):
        with pytest.raises(CheckpointMismatch, match="other weights"):
            load_models(other, detector, dtype=torch.float32)


def test_the_states_that_are_pooled() -> None:
    states = torch.arange(80.0).reshape(2, 40, 1)
    readings = [Reading(list(range(40)), 2), Reading(list(range(10)), 3)]
    mean, there = pool(states, readings, "mean", beginnings=True)
    assert there.tolist() == [[True], [False]]
    assert mean[0, :, 0].tolist() == pytest.approx([20.5, 9.5])  # tokens 2 to 39; the first 16 of them
    assert float(mean[1, 0, 0]) == pytest.approx(46.0)
    last, _ = pool(states, readings, "last", beginnings=True)
    assert last[0, :, 0].tolist() == [39.0, 17.0] and float(last[1, 0, 0]) == 49.0


def test_a_cut_answer_keeps_its_prompt_and_its_invocation(base: Path) -> None:
    codec = load_models(base).models["mllm"].codec
    prompt = codec.encode_chat(Chat.single("Why?"))
    reading = conversation_reading(codec, "Why?", "so " * 50, len(prompt) + 10, [300, 301])
    assert reading is not None
    assert (reading.tokens[: len(prompt)], reading.tokens[-2:], len(reading.tokens)) == (
        prompt,
        [300, 301],
        len(prompt) + 10,
    )
    assert (reading.pool_from, reading.active_from) == (len(prompt), len(prompt) + 8)
    whole = conversation_reading(codec, "Why?", "so", 512, [300])
    assert whole is not None and whole.tokens[-2:] == [codec.tokenizer.eos_token_id, 300]
    assert text_reading(codec, "question_answer", "Why?" * 9, "so", 20) is None


def test_a_detector_that_finds_refusals_harmful_is_not_written() -> None:
    refusals = [Example(f"I'm sorry, I can't tell {n}.", Kind.REFUSING, Source.PLAIN, str(n), "?") for n in range(6)]
    harmful = [Example(f"Take {n}.", Kind.HARMFUL, Source.PLAIN, str(n), "?") for n in range(6)]
    logits = torch.tensor([1.0] * 6 + [-1.0] * 6)
    check_refusals([*refusals, *harmful], logits)
    check_refusals([*refusals[:4], *harmful], -logits[2:])  # too few to tell
    with pytest.raises(DetectorUnfit, match="6 plain refusals"):
        check_refusals([*refusals, *harmful], -logits)


@pytest.mark.parametrize(
    ("form", "recipe", "words"),
    [
        (Form(template="context"), QUICK, "template must be"),
        (Form(pooling="mean"), replace(QUICK, adapter="alora"), "pooling must be last"),
        (Form(false_positives=0.0), QUICK, "false_positives"),
        (Form(layer=4), QUICK, "layer must be 1 to 3"),
    ],
)
def test_what_cannot_be_trained(
    form: Form, recipe: Recipe, words: str, base: Path, toy: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=words):
        train_detector(base, toy, tmp_path / "det", form=form, recipe=recipe)


@pytest.mark.parametrize("values", [{"rate": 0.0}, {"epochs": 0}, {"targets": ("lm_head",)}, {"warmup": 1.0}])
def test_a_recipe_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(values))):
        Recipe(**values)


def test_the_command_and_the_answers_that_the_base_gives_itself(base: Path, data: Path, tmp_path: Path) -> None:
    (data / "plain").mkdir()
    rows = '{"question": "Q", "response": "A", "harmless": true}\n{"question": "Q"}\n'
    (data / "plain" / "own.jsonl").write_text(rows)
    options = [
        "--layer=1",
        "--pooling=mean",
        "--epochs=1",
        "--batch=16",
        "--limit=4",
        "--device=cpu",
        "--rate",
        "1e-3",
    ]
    arguments = ["train", "detector", str(base), "--data", str(data), "--out", str(tmp_path / "det"), *options]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, DataInvalid) and "line 2" in str(refused.exception)
    done = CliRunner().invoke(app, [*arguments, "--skip-bad"])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "det" / "README.md").read_text()
    assert "1 rows of the wrong form" in card and "XSTest, answered by the model" in card
    wrong = CliRunner().invoke(app, [*arguments[:-1], "-1"])
    assert isinstance(wrong.exception, BadInput) and "rate" in str(wrong.exception)
