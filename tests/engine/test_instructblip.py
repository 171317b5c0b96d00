"""InstructBLIP: what an image becomes depends on the prompt."""

from __future__ import annotations

import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from stockade.engine.errors import CheckpointMismatch, CheckpointMissing, UnknownArchitecture
from stockade.engine.images import load_image
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.shapes import image_processor_for
from stockade.engine.models.vision.instructblip import InstructBlipVision
from tests.conftest import BASE, VOCAB
from tests.engine.eyes import (
    ADDED,
    PICTURES,
    SHORT,
    FamilyTests,
    chat,
    last_logits,
    picture,
    pictures,
    save_tokenizer,
)

IMAGE, QUERIES, READ = 3, 5, 512
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
READER = {name: id for id, name in enumerate([*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)])}


def save_reader(folder: Path) -> PreTrainedTokenizerFast:
    """The Q-Former's tokenizer, as BERT's but of single letters."""
    tokenizer = Tokenizer(models.WordPiece(READER, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True)))
    fast.save_pretrained(folder / "qformer_tokenizer")
    return fast


class Reference:
    """The model of `transformers`, whose language model answers where there is no image."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **given: Any) -> Any:
        return (self.model if "pixel_values" in given else self.model.language_model)(**given)

    def generate(self, **given: Any) -> Any:
        return (self.model if "pixel_values" in given else self.model.language_model).generate(**given)


class TestInstructBlip(FamilyTests):
    small_pool = 20

    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<image>", ())
        save_reader(folder)
        BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
        return config(LlamaConfig(**{**BASE, "vocab_size": VOCAB + len(ADDED)}))

    @pytest.fixture(scope="class")
    def reference(self, folder: Path) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        model.language_model.generation_config.eos_token_id = None
        return Reference(model)

    def inputs(self, folder: Path, models: ModelSet, messages: list[dict[str, Any]]) -> dict[str, Any]:
        tokenizer = models.models["mllm"].codec.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = pictures(messages)
        given = dict(tokenizer(text.replace("<image>", "<image>" * QUERIES), return_tensors="pt"))
        if images:
            reader = PreTrainedTokenizerFast.from_pretrained(folder / "qformer_tokenizer")
            given |= image_processor_for(folder)(images=images, return_tensors="pt")
            read = reader([text.replace("<image>", "")] * len(images), return_tensors="pt")["input_ids"]
            given["qformer_input_ids"] = read
        return given

    def test_the_question_changes_what_the_image_becomes(self, models: ModelSet) -> None:
        eyes = models.models["mllm"].backbone.vision
        assert isinstance(eyes, InstructBlipVision)
        image, runs = load_image(picture(21, (56, 28))), eyes.seen.misses
        one, other, again = (eyes.prepare([image], text)[0] for text in ("a cat?", "a dog?", "a cat?"))
        assert one.key == again.key != other.key
        first, second = eyes.encode([one, other])
        assert (first - second).abs().max() > 1e-3
        assert eyes.seen.misses == runs + 1  # of the tower

    def test_an_image_of_several_prompts_goes_through_the_tower_once(self, models: ModelSet) -> None:
        engine, eyes = self.new(models), models.models["mllm"].backbone.vision
        assert isinstance(eyes, InstructBlipVision)
        image, runs = picture(22, (56, 28)), eyes.seen.misses
        engine.chat([chat("Which?", image), chat("What?", image)], sampling=SHORT)
        assert engine.runner.images_encoded == 2 and eyes.seen.misses == runs + 1

    def test_a_text_that_is_too_long_is_read_from_its_beginning(self, folder: Path, models: ModelSet) -> None:
        eyes = models.models["mllm"].backbone.vision
        assert eyes is not None
        (image,) = eyes.prepare([load_image(PICTURES[0])], "so " * READ)
        reader = PreTrainedTokenizerFast.from_pretrained(folder / "qformer_tokenizer")
        wanted = reader("so " * READ, truncation=True, max_length=READ)["input_ids"]
        assert image.inputs["qformer_input_ids"].tolist() == [wanted]
        assert eyes.encode([image])[0].shape == (1, QUERIES, BASE["hidden_size"])

    def test_special_tokens_that_a_user_spells_stay_text(self, models: ModelSet) -> None:
        eyes = models.models["mllm"].backbone.vision
        assert eyes is not None
        (image,) = eyes.prepare([load_image(PICTURES[0])], "[SEP][CLS] \u4e00")
        read = image.inputs["qformer_input_ids"][0].tolist()
        wanted = [READER[letter] for letter in ("[", "s", "##e", "##p", "]", "[", "c", "##l", "##s", "]", "[UNK]")]
        assert read == [READER["[CLS]"], *wanted, READER["[SEP]"]]
        ids, _ = last_logits(self.new(models), chat("<image> \u4e00", PICTURES[0]))
        assert ids.count(IMAGE) == QUERIES

    def test_without_a_template_the_prompt_is_as_its_processor_writes_it(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "plain")
        (tmp_path / "plain" / "chat_template.jinja").unlink()
        models = load_models(tmp_path / "plain", dtype=torch.float32)
        tokenizer = models.models["mllm"].codec.tokenizer
        reader = PreTrainedTokenizerFast.from_pretrained(folder / "qformer_tokenizer")
        wanted = InstructBlipProcessor(image_processor_for(folder), tokenizer, reader, QUERIES)(
            images=PICTURES[0], text="What is this?", return_tensors="pt"
        )
        engine = self.new(models)
        engine.submit(chat("What is this?", PICTURES[0]), sampling=SHORT)
        (work,) = engine.scheduler.schedule(engine.lanes[0])
        assert [work.sequence.tokens] == wanted["input_ids"].tolist()
        given = work.sequence.images[0].image.inputs
        torch.testing.assert_close(given["qformer_input_ids"], wanted["qformer_input_ids"])
        torch.testing.assert_close(given["pixel_values"], wanted["pixel_values"])

    def test_what_does_not_belong_together_is_refused(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "size")
        BlipImageProcessorPil(size={"height": 28, "width": 56}).save_pretrained(tmp_path / "size")
        with pytest.raises(CheckpointMismatch, match=r"images of \(28, 56\) pixels; the tower takes \(28, 28\)"):
            load_models(tmp_path / "size")
        shutil.copytree(folder, tmp_path / "reader")
        save_tokenizer(tmp_path / "reader" / "qformer_tokenizer", "", ())
        with pytest.raises(CheckpointMismatch, match="the Q-Former's tokenizer has 386 tokens; it has weights for"):
            load_models(tmp_path / "reader")
        shutil.rmtree(tmp_path / "reader" / "qformer_tokenizer")
        with pytest.raises(CheckpointMissing, match="qformer_tokenizer has no usable tokenizer"):
            load_models(tmp_path / "reader")


def config(text: Any, **changes: Any) -> InstructBlipConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return InstructBlipConfig(
        **{
            "text_config": text,
            "vision_config": {**sizes, "image_size": 28, "patch_size": 7},
            "qformer_config": {**sizes, "vocab_size": len(READER), "max_position_embeddings": READ},
            "num_query_tokens": QUERIES,
            "image_token_index": IMAGE,
            **changes,
        }
    )


@pytest.mark.parametrize(
    "text",
    [
        T5Config(vocab_size=9, d_model=64, num_layers=1),
        OPTConfig(vocab_size=9, hidden_size=48, word_embed_proj_dim=48, num_hidden_layers=1),
    ],
)
def test_other_language_models_are_refused(tmp_path: Path, text: Any) -> None:
    TestInstructBlip().save(tmp_path)
    made = config(text)
    model = AutoModelForImageTextToText.from_config(made)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match=rf"unknown decoder family '{text.model_type}'; known: llama, "):
        load_models(tmp_path)


def test_a_configuration_without_an_image_token_is_refused(tmp_path: Path) -> None:
    made = TestInstructBlip().save(tmp_path)
    made.image_token_index = None
    AutoModelForImageTextToText.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match="the instructblip configuration names no image_token_id"):
        load_models(tmp_path)
