"""The published guards of the engine against the released scripts on `transformers`: same texts, same decisions.

The checkpoints are random, then taught: their output heads are fitted to end each text of one conversation after a
few tokens, and to say one word as judge. A random model never says yes, and talks to the end of its context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig

from stockade.bench import published
from stockade.bench.published import (
    Classifier,
    Probe,
    PublishedEcso,
    PublishedProtector,
    PublishedReply,
    Ran,
    Speaker,
)
from stockade.engine.engine import Engine
from stockade.engine.guards import Guard
from stockade.engine.models.heads import Head, HeadSpec, save_head
from stockade.engine.request import Outcome, Reply
from tests.conftest import BASE, IMAGE_TOKEN, save_tokenizer, scatter_norms, tiny_llava

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "published-prompts.json").read_text(encoding="utf-8"))
QUERY = "What is shown here, and how is it made?"
PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (60, 60, 3), dtype=np.uint8))
CONTEXT = 4096
SPOKEN = 6  # tokens of a taught text


class Teacher(Speaker):
    """Speaks as the checkpoint does for a few tokens, or a given word; remembers where the text has to end."""

    def __init__(self, folder: Path, **words: str) -> None:
        super().__init__(folder, torch.float32, ignore_eos=True)
        self.folder = folder
        self.words = words
        self.states: list[torch.Tensor] = []  # [hidden] each, what the output head reads
        self.targets: list[int | None] = []  # the token it has to say there; None: what it says anyway

    @torch.inference_mode()
    def generate(self, label: str, prompt: str, images: Sequence[Any] = (), **bound: int) -> Ran:
        inputs = self.inputs(prompt, images)
        count = inputs["input_ids"].shape[1]
        if label in self.words:
            ids = [self.tokenizer.convert_tokens_to_ids(self.words[label])]
            self.targets += ids
        else:
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=SPOKEN)[0, count:].tolist()
            self.targets += [None] * len(ids)
        self.targets.append(self.tokenizer.eos_token_id)
        whole = torch.cat([inputs.pop("input_ids"), torch.tensor([ids])], 1)
        inputs.pop("attention_mask")
        states = self.model(input_ids=whole, output_hidden_states=True, **inputs).hidden_states[-1][0]
        self.states += states[count - 1 :]
        return Ran(label, self.decode(ids), count, len(ids), 0.0)

    def teach(self) -> Path:
        """Fit the rows of the taught tokens: they win where they should, and change nothing elsewhere."""
        head = self.model.get_output_embeddings().weight
        states = torch.stack(self.states)
        with torch.no_grad():
            logits = states @ head.T
            for token in {target for target in self.targets if target is not None}:
                missing = logits.amax(-1) - logits[:, token] + 5.0
                wanted = torch.tensor([target == token for target in self.targets])
                head[token] += (torch.linalg.pinv(states.double()) @ (missing * wanted).double()).float()
        self.model.save_pretrained(self.folder)
        return self.folder


def save_llava(folder: Path) -> Path:
    torch.manual_seed(11)
    model = tiny_llava(folder)
    model.config.text_config.max_position_embeddings = CONTEXT
    scatter_norms(model)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, IMAGE_TOKEN)
    return folder


def save_text(folder: Path) -> Path:
    torch.manual_seed(12)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**BASE, "max_position_embeddings": CONTEXT}))
    scatter_norms(model)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def engine_on(*folders: Path) -> Engine:
    return Engine(*folders, device="cpu", dtype=torch.float32, kv_bytes=32 << 20, tokens_per_page=16)


def ask(engine: Engine, guard: Guard, images: list[Image.Image]) -> Reply:
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": QUERY}]
    (reply,) = engine.chat([[{"role": "user", "content": parts}]], guard=guard)
    return reply


def assert_same(reply: Reply, want: PublishedReply) -> None:
    assert reply.text == want.text
    assert reply.outcome is (Outcome.MENDED if want.harmful else Outcome.CLEAN)
    assert [record.label for record in reply.passes] == [ran.label for ran in want.passes]
    # a pass keeps its text as it was decoded; the scripts strip it before it is used
    assert [record.text.strip() for record in reply.passes] == [ran.text.strip() for ran in want.passes]
    assert [record.prompt_tokens for record in reply.passes] == [ran.prompt_tokens for ran in want.passes]
    assert [verdict.harmful for verdict in reply.verdicts] == [want.harmful]
    assert reply.verdicts[0].score == pytest.approx(want.score, abs=1e-5)


@pytest.mark.parametrize("images", [[PICTURE], []], ids=["image", "text"])
def test_protector_is_the_released_script(
    images: list[Image.Image], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    detector = Classifier(checkpoint("classifier"), torch.float32)
    teachers = [Teacher(save_llava(tmp_path / "mllm")), Teacher(save_text(tmp_path / "detoxifier"))]
    lesson = PublishedProtector(teachers[0], detector, teachers[1], threshold=2.0).answer(QUERY, images)
    mllm, detoxifier = (teacher.teach() for teacher in teachers)
    pipeline = PublishedProtector(Speaker(mllm, torch.float32), detector, Speaker(detoxifier, torch.float32))
    engine = engine_on(mllm, checkpoint("classifier"), detoxifier)
    for threshold, harmful in ((lesson.score - 0.01, False), (lesson.score + 0.01, True)):
        pipeline.threshold = threshold
        want = pipeline.answer(QUERY, images)
        assert want.harmful is harmful and len(want.passes) == 2 + harmful
        assert all(1 < ran.new_tokens < 20 for ran in want.passes if ran.label != "score")
        assert_same(ask(engine, Guard.protector(published=True, threshold=threshold), images), want)
    without = PublishedProtector(pipeline.mllm, detector, None, threshold=2.0).answer(QUERY, images)
    reply = ask(engine, Guard.protector(published=True, threshold=2.0, detoxifier=None), images)
    assert reply.text == without.text == published.REFUSAL
    engine.check_integrity()


@pytest.mark.parametrize("word", ["yes", "no"])
@pytest.mark.parametrize("images", [[PICTURE], []], ids=["image", "text"])
def test_ecso_is_the_released_script(images: list[Image.Image], word: str, tmp_path: Path) -> None:
    teacher = Teacher(save_llava(tmp_path / "mllm"), judge=word)
    PublishedEcso(teacher).answer(QUERY, images)
    folder = teacher.teach()
    want = PublishedEcso(Speaker(folder, torch.float32)).answer(QUERY, images)
    assert want.harmful is (word == "yes") and want.passes[1].text == word
    assert len(want.passes) == (2 if word == "no" else 3 + len(images))
    assert all(1 < ran.new_tokens < 20 for ran in want.passes)
    engine = engine_on(folder)
    assert_same(ask(engine, Guard.ecso(published=True), images), want)
    engine.check_integrity()


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_the_path_is_forced_by_the_threshold(threshold: float, tmp_path: Path) -> None:
    teacher = Teacher(save_llava(tmp_path / "mllm"), judge="no")
    PublishedEcso(teacher, threshold=2.0).answer(QUERY, [PICTURE])
    folder = teacher.teach()
    want = PublishedEcso(Speaker(folder, torch.float32), threshold=threshold).answer(QUERY, [PICTURE])
    assert want.harmful is (threshold > 1.0)
    assert_same(ask(engine_on(folder), Guard.ecso(published=True, threshold=threshold), [PICTURE]), want)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_head_file_scores_as_in_the_engine(pooling: Any, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    folder, path = checkpoint("llama-gqa"), tmp_path / "head.safetensors"
    torch.manual_seed(3)
    save_head(Head(HeadSpec(2, pooling, norm=True), torch.randn(64), torch.randn(1), torch.rand(64) + 0.5), path)
    engine = Engine(folder, path, folder, device="cpu", dtype=torch.float32, kv_bytes=16 << 20, tokens_per_page=16)
    guard = Guard.protector(published=True, threshold=0.0)
    (reply,) = engine.chat([QUERY], guard=guard)
    text = published.tidy(reply.passes[0].text)
    score, tokens = Probe(path, folder, torch.float32).score(text)
    assert reply.verdicts[0].score == pytest.approx(score, abs=1e-5)
    assert reply.passes[1].prompt_tokens == tokens


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_prompts_are_those_of_the_released_code(case: dict[str, Any]) -> None:
    query, response, caption = case["query"], case["response"], case["caption"]
    protector, ecso = case["protector"], case["ecso"]
    assert published.conversation("human", query, 1) == protector["answer_prompt"]
    assert published.rewrite_prompt(response) == protector["detoxifier_prompt"]
    assert published.conversation("user", query, 1) == ecso["answer_prompt"]
    judge = published.judge_message(query, response[: published.JUDGE_CHARS])
    assert published.conversation("user", judge, 1) == ecso["judge_prompt"]
    assert published.conversation("user", published.caption_message(query), 1) == ecso["caption_prompt"]
    assert published.conversation("user", published.eyes_closed_message(query, caption)) == ecso["eyes_closed_prompt"]
