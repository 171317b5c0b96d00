"""Eyes that read: which tokens letters make, and what the engine does with a tower's rows."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlamaConfig, LlavaModel

from stockade.engine.errors import CheckpointMismatch, InvalidMessage
from stockade.engine.images import load_image
from stockade.engine.models.bundles import smol_folder
from stockade.engine.models.eyes import read_eyes
from stockade.engine.models.loader import load_models
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.models.vision.letters import INSIDE, LETTERS, LetterVision, letter, text_of, tokens_of, told
from stockade.engine.models.vision.spelling import Lexicon, words_of
from stockade.engine.text import Codec
from stockade.train.eyes_model import EYES_FILE, Eyes, eyes_config, image_token, save_eyes

SMOL = Codec(AutoTokenizer.from_pretrained(smol_folder()))
LEXICON = Lexicon(words_of(SMOL.tokenizer))
WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


def page(*rows: dict[int, str]) -> torch.Tensor:
    """Logits of letters that are sure, by row and column."""
    letters = torch.zeros(10, 10, INSIDE, dtype=torch.int64)
    for row, texts in enumerate(rows):
        for column, text in texts.items():
            letters[row, column, : len(text)] = torch.tensor([letter(one) for one in text])
    return 40 * F.one_hot(letters.flatten(0, 1), LETTERS).float()


def test_patches_are_read_row_by_row() -> None:
    assert text_of(page({}), LEXICON) == ""
    assert text_of(page({0: "Me", 1: "tho", 2: "ds t", 3: "o"}, {0: "make"}), LEXICON) == "Methods to make"
    assert text_of(page({0: " in", 3: "to "}, {9: "no"}, {0: "w"}), LEXICON) == "in to no w"
    # a blank ends a word, and so do two patches without letters; large letters leave one out
    assert text_of(page({0: "a b"}, {8: "so", 9: "me"}, {2: "in", 4: "to"}), LEXICON) == "a b some into"


def test_no_image_says_a_special_token() -> None:
    for special in SMOL.special_tokens:
        parts = [special[start : start + INSIDE] for start in range(0, len(special), INSIDE)]
        text = text_of(page(dict(enumerate(parts))), LEXICON)
        assert text == special
        assert not SMOL.special_ids & set(tokens_of(text, SMOL))
        assert len(tokens_of(text, SMOL)) > 1


def test_nothing_is_said_where_only_a_special_token_spells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> list[int]:
        raise InvalidMessage("a special token")

    monkeypatch.setattr(SMOL, "encode", refuse)
    assert tokens_of("so", SMOL) == []


@given(st.lists(st.lists(WORDS, max_size=3), max_size=10), st.integers(0, 2**32 - 1))
def test_whatever_stands_in_a_square_is_said_as_the_tokenizer_has_it(rows: list[list[str]], seed: int) -> None:
    rng = random.Random(seed)
    wanted, pages = [], []
    for words in rows:
        text, start, columns = " ".join(words), 0, {}
        for column in range(10):
            columns[column] = text[start : (start := start + rng.randint(1, INSIDE))]
        pages.append(columns)
        wanted += text[:start].split()
    text = text_of(page(*pages), LEXICON)
    assert text == " ".join(wanted)
    assert tokens_of(text, SMOL) == SMOL.tokenizer(text, add_special_tokens=False).input_ids or "<" in text


@given(st.lists(st.integers(0, 9), max_size=8))
def test_tokens_come_first_and_what_is_blank_keeps_its_places(tokens: list[int]) -> None:
    vocabulary, blank = torch.randn(10, 3), torch.randn(5, 3)
    said = told(tokens, blank, lambda ids: vocabulary[ids])
    assert said.shape == blank.shape
    for place, row in enumerate(said):
        assert torch.equal(row, vocabulary[tokens[place]] if place < len(tokens) else blank[place])


def saved_eyes(folder: Path, hidden: int) -> Eyes:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=hidden, intermediate_size=64, num_attention_heads=4, vocab_size=320)
    tokenizer = byte_tokenizer(320)
    config = eyes_config(text, tokenizer.convert_tokens_to_ids(image_token(tokenizer)))
    eyes = Eyes(config)
    save_eyes(eyes, torch.randn(100, hidden), config, folder)
    return eyes


def test_images_say_embeddings_of_the_words_their_patches_spell(tmp_path: Path, checkpoint: Any) -> None:
    base = checkpoint("llama-mha-tied")
    decoder = load_models(base, device="cpu", dtype=torch.float32).models["mllm"].backbone.decoder
    trained = saved_eyes(tmp_path, decoder.config.hidden_size)
    seeing = load_models((tmp_path / EYES_FILE, base), device="cpu", dtype=torch.float32).models["mllm"]
    vision = seeing.backbone.vision
    assert isinstance(vision, LetterVision)
    prepared = vision.prepare([load_image(Image.effect_noise((300, 200), 80))], "")
    (found,) = vision.encode(prepared)
    # by transformers' own tower and projector
    eyes: Any = LlavaModel._from_config(vision.config)
    tensors = load_file(tmp_path / EYES_FILE)
    state = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith("letters.")}
    assert not [name for name in eyes.load_state_dict(state, strict=False).missing_keys if "language" not in name]
    rows = eyes.get_image_features(pixel_values=prepared[0].inputs["pixel_values"]).pooler_output[0]
    codes = tensors["letters.codes"].float()
    size = codes.shape[1]
    named = torch.stack([rows[:, at * size : (at + 1) * size] @ codes.t() for at in range(INSIDE)], 1)
    lexicon = Lexicon(words_of(seeing.codec.tokenizer))
    tokens = tokens_of(text_of(named, lexicon), seeing.codec)[:100]
    with torch.no_grad():
        learned = trained.to(torch.bfloat16).float()(prepared[0].inputs["pixel_values"])[0]
    assert text_of(learned, lexicon) == text_of(named, lexicon)
    assert len(tokens) > 1
    blank = tensors["letters.blank"].float()
    assert torch.equal(found[0], torch.cat([decoder.embedding[tokens], blank[len(tokens) :]]))
    assert torch.equal(told([], vision.blank, vision.embed), blank)  # of a page without letters


def test_what_images_say_belongs_to_the_language_model(tmp_path: Path, checkpoint: Any) -> None:
    keys = set()
    for name in ("llama-mha-tied", "llama-gqa"):
        base = checkpoint(name)
        hidden = load_models(base, device="cpu").models["mllm"].backbone.decoder.config.hidden_size
        saved_eyes(tmp_path, hidden)
        vision = load_models((tmp_path / EYES_FILE, base), device="cpu").models["mllm"].backbone.vision
        assert vision is not None
        keys.add(vision.prepare([load_image(Image.new("RGB", (9, 9)))], "")[0].key)
    tokenizer = copy.deepcopy(vision.tokenizer)
    tokenizer.add_tokens(["so"])
    vision.freeze(vision.weights_hash[:-32], tokenizer)
    vision._prepared.clear()
    keys.add(vision.prepare([load_image(Image.new("RGB", (9, 9)))], "")[0].key)
    assert len(keys) == 3


def test_an_image_is_read_alike_alone_and_beside_others(tmp_path: Path, checkpoint: Any) -> None:
    base = checkpoint("llama-mha-tied")
    hidden = load_models(base, device="cpu").models["mllm"].backbone.decoder.config.hidden_size
    saved_eyes(tmp_path, hidden)
    vision = (
        load_models((tmp_path / EYES_FILE, base), device="cpu", dtype=torch.bfloat16).models["mllm"].backbone.vision
    )
    assert vision is not None
    images = vision.prepare([load_image(Image.effect_noise((90, 80 + width), 80)) for width in range(4)], "")
    together = vision.encode(images)
    assert len({found.sum().item() for found in together}) > 1
    for image, found in zip(images, together, strict=True):
        assert torch.equal(vision.encode([image])[0], found)


def test_eyes_of_another_shape_are_refused(tmp_path: Path, checkpoint: Any) -> None:
    base = checkpoint("llama-mha-tied")
    model = load_models(base, device="cpu").models["mllm"]
    hidden = model.backbone.decoder.config.hidden_size
    saved_eyes(tmp_path, hidden)
    whole = read_eyes(tmp_path / EYES_FILE, LlamaConfig(hidden_size=hidden))
    narrow = CLIPImageProcessorPil(size={"shortest_edge": 253})
    with pytest.raises(CheckpointMismatch, match="squares"):
        LetterVision(whole.config, narrow, torch.device("cpu"), torch.float32, model.codec, lambda ids: ids)
    for crop in ({"crop_size": {"height": 224, "width": 224}}, {"do_center_crop": False}):
        other = CLIPImageProcessorPil.from_dict({**whole.processor.to_dict(), **crop})
        with pytest.raises(CheckpointMismatch, match="crop"):
            LetterVision(whole.config, other, torch.device("cpu"), torch.float32, model.codec, lambda ids: ids)
    with_class = copy.deepcopy(whole.config)
    with_class.vision_config.image_size = 240 + 24
    with_class.vision_feature_select_strategy = "default"
    with pytest.raises(CheckpointMismatch, match="square of patches"):
        LetterVision(with_class, whole.processor, torch.device("cpu"), torch.float32, model.codec, lambda ids: ids)
    saved_eyes(tmp_path, 2 * hidden)
    with pytest.raises(CheckpointMismatch, match="shape"):
        load_models((tmp_path / EYES_FILE, base), device="cpu")
