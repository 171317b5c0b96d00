"""Eyes that read: which tokens letters make, and what the engine does with a tower's rows."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
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
from stockade.engine.models.vision.letters import INSIDE, NOTHING, LetterVision, letter, tokens_of
from stockade.engine.text import Codec, Untrusted
from stockade.train.eyes_model import EYES_FILE, Eyes, eyes_config, image_token, save_eyes

SMOL = Codec(AutoTokenizer.from_pretrained(smol_folder()))
WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


def page(*rows: dict[int, str]) -> torch.Tensor:
    """Letters by row and column."""
    letters = torch.zeros(10, 10, INSIDE, dtype=torch.int64)
    for row, texts in enumerate(rows):
        for column, text in texts.items():
            letters[row, column, : len(text)] = torch.tensor([letter(one) for one in text])
    return letters.flatten(0, 1)


def said(letters: torch.Tensor) -> dict[tuple[int, int], str]:
    tokens = enumerate(tokens_of(letters, SMOL).tolist())
    return {divmod(patch, 10): SMOL.tokenizer.decode([token]) for patch, token in tokens if token != NOTHING}


def test_words_are_said_where_they_begin() -> None:
    assert said(page({})) == {}
    assert said(page({0: "Me", 1: "tho", 2: "ds t", 3: "o"})) == {(0, 0): " Methods", (0, 2): " to"}
    # a blank ends a word, and so do two patches without letters, or the row; large letters leave one out
    assert said(page({0: "a b"}, {8: "so", 9: "me"}, {0: "one"})) == {
        (0, 0): " a",
        (0, 1): " b",
        (1, 8): " some",
        (2, 0): " one",
    }
    assert said(page({0: " in", 3: "to "})) == {(0, 0): " in", (0, 3): " to"}
    assert said(page({0: "in", 2: "to"})) == {(0, 0): " into"}
    assert said(page({0: "12."})) == {(0, 0): "1", (0, 1): "2", (0, 2): "."}


def test_where_a_row_has_no_room_tokens_move_left_and_the_last_are_left_out() -> None:
    assert said(page({8: "9876"})) == {(0, 6): "9", (0, 7): "8", (0, 8): "7", (0, 9): "6"}
    full = said(page(dict.fromkeys(range(10), "123")))
    assert "".join(full[0, column] for column in range(10)) == "1231231231"


def test_no_image_says_a_special_token() -> None:
    for special in SMOL.special_tokens:
        parts = [special[start : start + INSIDE] for start in range(0, len(special), INSIDE)]
        tokens = tokens_of(page(dict(enumerate(parts))), SMOL)
        assert not SMOL.special_ids & set(tokens.tolist())
        assert (tokens != NOTHING).sum() > 1


def test_what_can_only_be_a_special_token_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = SMOL.encode

    def refuses(segments: list[Untrusted], *, add_special_tokens: bool) -> list[int]:
        if "no" in segments[0].text:
            raise InvalidMessage("a special token")
        return encode(segments, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(SMOL, "encode", refuses)
    assert said(page({0: "no", 1: " so"})) == {(0, 1): " so"}


@given(st.lists(WORDS, max_size=4), st.integers(0, 2**32 - 1))
def test_whatever_stands_in_a_row_is_said_as_the_tokenizer_has_it(words: list[str], seed: int) -> None:
    rng = random.Random(seed)
    text, columns = " ".join(words), {}
    start = 0
    for column in range(10):
        end = start + rng.randint(1, INSIDE)
        columns[column] = text[start:end]
        start = end
    told = text[:start].split()
    wanted = [
        id
        for word in told
        for place, id in enumerate(SMOL.encode([Untrusted(f" {word}")], add_special_tokens=False))
        if place or SMOL.tokenizer.decode([id]).strip()
    ]
    tokens = tokens_of(page(columns), SMOL)
    assert not tokens[10:].add(1).any()
    assert [token for token in tokens[:10].tolist() if token != NOTHING] == wanted[:10]


def saved_eyes(folder: Path, hidden: int) -> Eyes:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=hidden, intermediate_size=64, num_attention_heads=4, vocab_size=320)
    tokenizer = byte_tokenizer(320)
    config = eyes_config(text, tokenizer.convert_tokens_to_ids(image_token(tokenizer)))
    eyes = Eyes(config)
    save_eyes(eyes, torch.randn(100, hidden), config, folder)
    return eyes


def test_patches_say_embeddings_of_the_words_they_read(tmp_path: Path, checkpoint: Any) -> None:
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
    named = torch.stack([(rows[:, at * size : (at + 1) * size] @ codes.t()).argmax(-1) for at in range(INSIDE)], 1)
    tokens = tokens_of(named, seeing.codec)
    with torch.no_grad():
        learned = trained.to(torch.bfloat16).float()(prepared[0].inputs["pixel_values"])[0].argmax(-1)
    assert torch.equal(tokens_of(learned, seeing.codec), tokens)
    assert (tokens != NOTHING).sum() > 1
    for patch, token in enumerate(tokens.tolist()):
        blank = tensors["letters.blank"][patch].float()
        assert torch.equal(found[0, patch], blank if token == NOTHING else decoder.embedding[token])


def test_what_images_say_belongs_to_the_language_model(tmp_path: Path, checkpoint: Any) -> None:
    keys = set()
    for name in ("llama-mha-tied", "llama-gqa"):
        base = checkpoint(name)
        hidden = load_models(base, device="cpu").models["mllm"].backbone.decoder.config.hidden_size
        saved_eyes(tmp_path, hidden)
        vision = load_models((tmp_path / EYES_FILE, base), device="cpu").models["mllm"].backbone.vision
        assert vision is not None
        keys.add(vision.prepare([load_image(Image.new("RGB", (9, 9)))], "")[0].key)
    assert len(keys) == 2


def test_eyes_of_another_shape_are_refused(tmp_path: Path, checkpoint: Any) -> None:
    base = checkpoint("llama-mha-tied")
    model = load_models(base, device="cpu").models["mllm"]
    hidden = model.backbone.decoder.config.hidden_size
    saved_eyes(tmp_path, hidden)
    whole = read_eyes(tmp_path / EYES_FILE, LlamaConfig(hidden_size=hidden))
    narrow = CLIPImageProcessorPil(size={"shortest_edge": 253})
    with pytest.raises(CheckpointMismatch, match="squares"):
        LetterVision(whole.config, narrow, torch.device("cpu"), torch.float32, model.codec, lambda ids: ids)
    with_class = copy.deepcopy(whole.config)
    with_class.vision_config.image_size = 240 + 24
    with_class.vision_feature_select_strategy = "default"
    with pytest.raises(CheckpointMismatch, match="square of patches"):
        LetterVision(with_class, whole.processor, torch.device("cpu"), torch.float32, model.codec, lambda ids: ids)
    saved_eyes(tmp_path, 2 * hidden)
    with pytest.raises(CheckpointMismatch, match="shape"):
        load_models((tmp_path / EYES_FILE, base), device="cpu")
