"""Eyes for a tiny language model: what pictures ask for, that training learns and goes on, and what engines read."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.chat import Chat, Message
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, ImagesNotSupported
from stockade.engine.images import load_image
from stockade.engine.models.eyes import template_with_images
from stockade.engine.models.loader import load_models
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.prepare import encode
from stockade.train.eyes import Course, painter_of, train_eyes
from stockade.train.eyes_composed import composed, examples, keys_of, library
from stockade.train.eyes_gaze import GAZES, look_along_rows
from stockade.train.eyes_lesson import Lesson
from stockade.train.eyes_model import (
    BEFORE,
    EYES_FILE,
    LETTERS_AFTER,
    PIXELS,
    SIDE,
    Eyes,
    eyes_config,
    image_token,
    patch_at,
    pixels_of,
)
from stockade.train.eyes_quality import evaluate, read_pictures, scene_question, words_read
from stockade.train.eyes_speech import Reader, Speech, exercise
from stockade.train.eyes_targets import EMPTY, Speller, wanted
from stockade.train.eyes_texts import Texts, read_texts
from stockade.train.loop import AnotherRun
from stockade.train.muon import Muon, orthogonal
from stockade.train.pictures import OTHERS, Painter, default_fonts, drawn, usable_fonts
from stockade.train.rows import DataMissing

FONTS = default_fonts()[:2]
TEXTS = Texts(
    ("the quick brown fox jumps over the lazy dog",) * 3,
    ("a new text of some words",),
    (("What is quick?", "1. the brown fox"), ("And the dog?", "lazy")),
)
QUICK = Course(reading=2, letters=2, words=2, batch=2, shelved=40, pages=20)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return painter_of(byte_tokenizer(320), TEXTS, FONTS, 0.6)


@pytest.mark.parametrize("style", ["list", *OTHERS])
def test_pictures_depend_on_their_number_alone_and_say_where_text_is(painter: Painter, style: str) -> None:
    for number in range(4):
        picture, again = (painter.draw(random.Random(number), style) for _ in range(2))
        assert picture.image.tobytes() == again.image.tobytes()
        assert picture.image.width == picture.image.height
        assert bool(picture.caption) == (style == "scene") == (not picture.lines)
        for line in picture.lines:
            assert 0 < line.y < 1
            assert len(line.xs) == len(line.text)
            assert list(line.xs) == sorted(line.xs)
            assert 0 < line.xs[0] < line.xs[-1] < 1 or len(line.xs) == 1
    assert painter.draw(random.Random(1), style).image.tobytes() != picture.image.tobytes()


def test_lines_stand_where_they_are_said_to_stand(painter: Painter) -> None:
    picture = painter._text(["HELLO", "HH"], FONTS[0], 60, (400, 400), 20, 30, 40, "page")
    dark = torch.from_numpy(np.array(picture.image)) < 128
    for line in picture.lines:
        row = dark[int(line.y * 400)]
        for x in (line.xs[0], line.xs[-1]):
            assert row[int(x * 400) - 25 : int(x * 400) + 25].any()
    assert not dark[:30].any()


def test_tokens_stand_where_they_begin_and_nothing_is_lost() -> None:
    tokenizer = byte_tokenizer(320).backend_tokenizer
    painter = painter_of(byte_tokenizer(320), TEXTS, FONTS, 0.6)
    picture = painter._text(["ab no"], FONTS[0], 60, (400, 400), 20, 30, 40, "page")
    asked = wanted(picture.lines, Speller(tokenizer))
    row = patch_at(picture.lines[0].y)
    said = [int(token) for token in asked.tokens.view(SIDE, SIDE)[row] if token != EMPTY]
    assert tokenizer.decode(said) == " ab no"
    assert (asked.tokens != EMPTY).sum() == len(said)
    letters = [chr(32 + int(letter)) for letter in asked.letters.view(SIDE, SIDE, -1)[row].flatten() if letter]
    assert "".join(letters) == "abno"
    caption = wanted((), Speller(tokenizer), "no")
    assert tokenizer.decode([int(token) for token in caption.tokens if token != EMPTY]) == " no"


def test_words_are_said_in_the_tokens_that_the_model_knows_them_by() -> None:
    tokenizer = byte_tokenizer(320).backend_tokenizer
    ids, starts = Speller(tokenizer).spelled("The fox.  12!")
    said: dict[int, list[int]] = {}
    for id, start in zip(ids, starts, strict=True):
        said.setdefault(start, []).append(id)
    assert {start: tokenizer.decode(some) for start, some in said.items()}[10] == "12"[:1]  # no blank before digits
    assert tokenizer.decode(ids) == " The fox.12!"
    assert starts == sorted(starts)
    assert [
        id for word in (" The", " fox.", "12!") for id in tokenizer.encode(word, add_special_tokens=False).ids
    ] == ids


def test_a_patch_is_asked_for_the_word_that_begins_in_it_or_goes_on(painter: Painter) -> None:
    picture = painter._text(["ab nose"], FONTS[0], 50, (400, 400), 20, 30, 40, "page")
    asked = wanted(picture.lines, Speller(byte_tokenizer(320).backend_tokenizer))
    line = picture.lines[0]
    columns = [patch_at(x) for x in line.xs]
    rows = asked.windows.view(SIDE, SIDE, -1)
    row = rows[patch_at(line.y)]

    def letters(column: int) -> str:
        return "".join(chr(32 + int(letter)) if letter else "_" for letter in row[column])

    assert letters(columns[0])[BEFORE:].rstrip("_") == "ab"
    assert letters(columns[3]) == "___nose________"
    last = next(place for place in range(4, 7) if columns[place] == columns[6] != columns[3])
    assert letters(columns[6])[BEFORE:].rstrip("_") == "nose"[last - 3 :]
    assert letters(columns[6])[:BEFORE] == "___nose"[last - 3 : last]
    inside = asked.letters.any(1)
    assert (asked.windows.any(1) == inside).all()


def test_a_row_with_more_tokens_than_patches_keeps_the_first(painter: Painter) -> None:
    picture = painter._text(["abcdefghijklmnop"], FONTS[0], 20, (400, 400), 5, 5, 10, "page")
    row = wanted(picture.lines, Speller(byte_tokenizer(320).backend_tokenizer)).tokens[:SIDE]
    assert (row != EMPTY).all()


def test_it_trains_resumes_to_the_same_result_and_engine_and_transformers_read_it(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama-mha-tied")
    card = train_eyes(base, tmp_path / "whole", texts=TEXTS, fonts=FONTS, course=QUICK)
    assert [len(losses) for losses in card.losses] == [2, 2, 2]
    assert card.parameters < 8_000_000
    assert (tmp_path / "whole" / EYES_FILE).stat().st_size < 16 << 20

    class Stop(Exception):
        pass

    def stop(what: str, done: int, of: int) -> None:
        if what == "learning words":
            raise Stop

    arguments = {"texts": TEXTS, "fonts": FONTS, "save_seconds": 0.0}
    with pytest.raises(Stop):
        train_eyes(base, tmp_path / "parts", course=QUICK, progress=stop, **arguments)
    with pytest.raises(AnotherRun):
        train_eyes(base, tmp_path / "parts", course=replace(QUICK, seed=1), **arguments)
    resumed = train_eyes(base, tmp_path / "parts", course=QUICK, **arguments)
    assert resumed.losses == card.losses
    one, other = (load_file(tmp_path / name / EYES_FILE) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    folder = tmp_path / "whole"
    mllm = load_models(folder, device="cpu", dtype=torch.float32).models["mllm"]
    vision = mllm.backbone.vision
    assert vision is not None
    picture = drawn(painter_of(mllm.codec.tokenizer, TEXTS, FONTS, 0.6), "0", 0)
    prepared = vision.prepare((load_image(picture.image),), "")
    assert prepared[0].tokens == SIDE * SIDE
    assert torch.allclose(prepared[0].inputs["pixel_values"], pixels_of([picture.image]), atol=1e-6)
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs = whole.get_image_features(pixel_values=pixels_of([picture.image])).pooler_output[0]
    assert torch.allclose(vision.encode(prepared)[0][0], theirs, atol=1e-4)
    apart = load_models((folder / EYES_FILE, base), device="cpu", dtype=torch.float32).models["mllm"]
    plain = load_models(base, device="cpu", dtype=torch.float32).models["mllm"]
    assert apart.backbone.content_hash == plain.backbone.content_hash
    assert encode(apart, Chat.single("so")).tokens == encode(plain, Chat.single("so")).tokens
    shown = encode(apart, Chat((Message("user", (load_image(picture.image), "so")),)))
    assert shown.tokens.count(apart.image_token_id) == SIDE * SIDE
    assert apart.backbone.vision is not None
    features = apart.backbone.vision.encode([placed.image for placed in shown.images])[0]
    assert torch.equal(features, vision.encode(prepared)[0])
    engine = Engine(folder, device="cpu", dtype=torch.float32)
    scores = evaluate(engine, painter_of(mllm.codec.tokenizer, TEXTS, FONTS, 0.6, held_out=True), 1)
    assert [score.pictures for score in scores] == [1, 1, 1, 1]
    assert all(0 <= score.right <= score.of for score in scores)


def tiny_eyes() -> tuple[Eyes, Lesson]:
    torch.manual_seed(0)
    eyes = Eyes(eyes_config(LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4), 3))
    speller = Speller(byte_tokenizer(320).backend_tokenizer)
    return eyes, Lesson(speller, torch.randn(320, 64), torch.randn(SIDE**2, 64), torch.eye(64))


def test_letters_and_words_are_learned_by_layers_of_their_own(painter: Painter) -> None:
    eyes, lesson = tiny_eyes()
    pictures = [drawn(painter, "0", number) for number in range(4)]
    asked = lesson.asked(pictures)
    with torch.no_grad():
        states = eyes.look_around(lesson.pixels(pictures)).flatten(0, 1)
    rest = (torch.arange(SIDE**2).repeat(4), asked.tokens.flatten(), asked.windows.flatten(0, 1))
    for parameters, loss in (
        (eyes.spelling(), lambda: lesson.letters_loss(eyes, pictures)),
        (eyes.saying(), lambda: lesson.words_loss(eyes, states, *rest)),
    ):
        optimizer = Muon(parameters.values(), lr=2e-3)
        losses = []
        for _ in range(12):
            losses.append(loss())
            losses[-1].backward()
            assert {name for name, value in eyes.named_parameters() if value.grad is not None} == parameters.keys()
            optimizer.step()
            eyes.zero_grad()
        assert losses[-1] < 0.8 * losses[0]
    assert 0 <= lesson.said(eyes, pictures) <= 1


def test_single_patches_say_what_pictures_do(painter: Painter) -> None:
    eyes, lesson = tiny_eyes()
    pixels = lesson.pixels([drawn(painter, "0", number) for number in range(8)])
    look_along_rows(eyes, pixels)
    with torch.no_grad():
        assert torch.allclose(eyes.say(eyes.look_around(pixels))[1], eyes.see(pixels), atol=1e-4)


def test_states_put_together_from_patches_are_those_of_a_picture() -> None:
    eyes, lesson = tiny_eyes()
    painter = painter_of(byte_tokenizer(320), TEXTS, default_fonts(), 0.6)
    # every patch of the line has other letters, so there is one patch alone to put into each place
    pictures = [painter.listed("abcdefghijklmno", items=False), *(drawn(painter, "0", n) for n in range(12))]
    look_along_rows(eyes, lesson.pixels(pictures))
    known = library(eyes, lesson.lettered([pictures[:1]]))
    lettered = known.keys[known.keys != 0]
    assert len(lettered) == SIDE
    assert (known.counts[known.keys != 0] == 1).all()
    some = examples(known, [pictures[0].lines], lesson.speller)
    with torch.no_grad():
        states, patch = composed(eyes, known, some.kinds)
        real = eyes.look_around(lesson.pixels(pictures[:1]))[0]
    line = patch_at(pictures[0].lines[0].y) * SIDE
    # where all that is looked at has letters, too
    inside = [n for n, at in enumerate(patch.tolist()) if line <= at < line + SIDE and (some.kinds[n] > 0).all()]
    assert len(inside) >= 3
    off = (states - real[patch])[inside].square().sum() / (real[patch] - real.mean(0))[inside].square().sum()
    assert off < 0.05
    tokens, _, windows = wanted(pictures[0].lines, lesson.speller)
    assert torch.equal(some.tokens[inside], tokens[patch[inside]])
    assert torch.equal(some.windows[inside].long(), windows[patch[inside]])


def test_pages_are_put_together_as_far_as_the_library_has_their_letters(painter: Painter) -> None:
    eyes, lesson = tiny_eyes()
    known = library(eyes, lesson.lettered([[painter.listed("the quick brown fox", items=True)]]))
    assert (known.keys.diff() > 0).all()
    assert int(known.counts.sum()) == len(known.patch) == len(known.states) == len(known.codes)
    of_the_same = examples(known, [painter.listed("quick fox", items=False).lines], lesson.speller)
    assert (of_the_same.tokens != EMPTY).any()
    other = examples(known, [painter.listed("zzzzz zzzzz", items=False).lines], lesson.speller)
    assert (known.keys[other.kinds.long()] == 0).all()
    torch.manual_seed(1)
    states, patch = composed(eyes, known, of_the_same.kinds)
    torch.manual_seed(1)
    again, _ = composed(eyes, known, of_the_same.kinds)
    assert torch.equal(states, again)
    assert states.shape == (len(of_the_same.tokens), eyes.code.in_features)
    assert ((patch >= 0) & (patch < SIDE**2)).all()


def test_lists_that_are_not_drawn_stand_where_drawn_ones_do(painter: Painter) -> None:
    lines = painter.lined(random.Random(3))
    text = " ".join(line.text for line in lines)
    whole = text.removesuffix(" 1. 2. 3.")
    assert painter.listed(whole, items=whole != text).lines == lines


def test_every_word_is_told_from_those_it_is_taken_for() -> None:
    tokenizer = byte_tokenizer(320)
    embedding = torch.randn(320, 64)
    lesson = Lesson(Speller(tokenizer.backend_tokenizer), embedding, torch.randn(SIDE**2, 64), torch.eye(64))
    beginnings = {id: tokenizer.decode([id]).strip().lower()[:3] for id in lesson.vocabulary.tolist()}
    distances = torch.cdist(embedding, embedding[lesson.vocabulary])
    for id in lesson.vocabulary.tolist():
        nearest = set(lesson.vocabulary[distances[id].argsort()[1:49]].tolist())
        rivals = lesson._rivals(torch.tensor([id]))[0].tolist()
        assert set(rivals[:16]) <= nearest
        assert {beginnings[rival] for rival in rivals[16:]} == {beginnings[id]}


def test_the_library_has_the_half_of_each_kind_that_is_read_best(painter: Painter) -> None:
    eyes, lesson = tiny_eyes()
    pictures = [painter.listed("the fox the fox the fox", items=False)]
    known = library(eyes, lesson.lettered([pictures, pictures, pictures]))
    once = library(eyes, lesson.lettered([pictures]))
    letters = known.keys != 0
    assert torch.equal(known.keys[letters], once.keys[once.keys != 0])
    # of three times as many, (3 n + 1) // 2 and not (n + 1) // 2
    _, _, every = keys_of(lesson.asked(pictures).letters).unique(return_inverse=True, return_counts=True)
    assert torch.equal(known.counts[letters], (3 * every[1:] + 1) // 2)


def test_errors_that_the_model_minds_count_more(checkpoint: Callable[[str], Path], painter: Painter) -> None:
    base = checkpoint("llama-mha-tied")
    tokenizer = AutoTokenizer.from_pretrained(base)
    language = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    token = image_token(tokenizer)
    tokenizer.chat_template = template_with_images(tokenizer.chat_template or "", token)
    reader = Reader(language, tokenizer, token, Speller(tokenizer.backend_tokenizer))
    speech = Speech(reader.embedding, reader.blank)
    torch.manual_seed(0)
    some = [exercise(painter, (), "0", number) for number in range(6)]
    felt = reader.sensitivity(speech, some)
    assert felt.trace() == pytest.approx(len(felt), rel=1e-3)
    values, directions = torch.linalg.eigh(felt)
    assert values[0] > -1e-4
    # what it costs to be wrong in the direction that is minded most, and in the one that is minded least
    exact = [reader._said(speech, one.picture) for one in some]

    def cost(direction: torch.Tensor) -> float:
        with torch.no_grad():
            losses = [
                reader._loss([one], [said + by * spoken[:, None] * direction])
                for one, (said, spoken) in zip(some, exact, strict=True)
                for by in (0.3, -0.3)
            ]
        return sum(abs(float(up - down)) for up, down in zip(losses[::2], losses[1::2], strict=True))

    assert cost(directions[:, -1]) > cost(directions[:, 0])
    lesson = Lesson(reader.speller, speech.words(reader.embedding).detach(), speech.empty().detach(), felt)
    tokens, patch = torch.tensor([70, 71]), torch.tensor([0, 1])
    losses = []
    for direction in (directions[:, -1], directions[:, 0]):
        torch.manual_seed(0)
        losses.append(lesson._choice(lesson.embedding[tokens] + 0.1 * direction, patch, tokens))
    assert losses[0] > losses[1]


def test_exercises_ask_for_the_text_or_for_an_answer_to_it(painter: Painter) -> None:
    some = [exercise(painter, TEXTS.answered, "0", number) for number in range(40)]
    assert some == [exercise(painter, TEXTS.answered, "0", number) for number in range(40)]
    written = [one for one in some if one.whole]
    assert 8 < len(written) < 32
    assert all(one.answer == one.picture.text for one in written)
    asked = {(one.picture.text.removesuffix(" 1. 2. 3."), one.answer) for one in some if not one.whole}
    assert asked == set(TEXTS.answered)
    assert all(one.whole for one in (exercise(painter, (), "0", number) for number in range(10)))


def test_heads_look_at_the_patches_beside() -> None:
    torch.manual_seed(0)
    eyes = Eyes(eyes_config(LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4), 3))
    pixels = torch.rand(8, 3, PIXELS, PIXELS)
    look_along_rows(eyes, pixels)
    with torch.no_grad():
        attention = eyes.vision_tower(pixel_values=pixels[:2], output_attentions=True).attentions[LETTERS_AFTER]
    for head, further in enumerate(GAZES):  # of [images, heads, patches, patches]
        at = torch.tensor([patch for patch in range(SIDE * SIDE) if 0 <= patch % SIDE + further < SIDE])
        assert (attention[:, head, at, at + further] > 0.8).all()


def test_words_are_read_in_order_whatever_their_case() -> None:
    assert words_read("Steps to bake. 1.", "It says: steps, to BAKE 1") == (4, 4)
    assert words_read("one two three", "three two") == (1, 3)
    assert words_read("don't", "dont") == (0, 1)


def test_scene_questions_have_one_right_answer() -> None:
    for number in range(20):
        asked = scene_question(0, number)
        assert asked.answers
        assert not asked.answers & asked.others
        assert asked.image.tobytes() == scene_question(0, number).image.tobytes()


def test_the_template_shows_images_and_leaves_texts_as_they_were() -> None:
    tokenizer = byte_tokenizer(320)
    before = tokenizer.apply_chat_template([{"role": "user", "content": "so"}], tokenize=False)
    template = template_with_images(tokenizer.chat_template, image_token(tokenizer))

    def rendered(content: object) -> str:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )

    assert rendered("so") == before
    assert rendered([{"type": "text", "text": "so"}]) == before
    assert rendered([{"type": "image"}, {"type": "text", "text": "so"}]).count("<image>") == 1


def test_a_tenth_of_the_questions_is_held_out_with_all_answers(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{number}", "response": f"answer {number} {model}"} for number in range(20) for model in "ab"
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = read_texts([tmp_path / "rows.jsonl"])
    assert (len(texts.train), len(texts.held_out)) == (36, 4)
    assert not {text.rpartition(" ")[0] for text in texts.train} & {
        text.rpartition(" ")[0] for text in texts.held_out
    }
    assert texts.answered[0] == ("q1", "answer 1 a")
    assert [answer for _, answer in texts.answered] == list(texts.train)
    (tmp_path / "plain.txt").write_text("one text\n\nanother text\n")
    plain = read_texts([tmp_path / "plain.txt"])
    assert (len(plain.train) + len(plain.held_out), plain.answered) == (2, ())


def test_what_cannot_be_used_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"response": "fine"}\n{"other": 1}\n')
    with pytest.raises(BadInput, match="line 2"):
        read_texts([tmp_path / "bad.jsonl"])
    with pytest.raises(DataMissing):
        read_texts([tmp_path / "missing.txt"])
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(BadInput, match="no usable font"):
        usable_fonts([tmp_path])
    (tmp_path / "pictures.csv").write_text("picture,words\na.png,b\n")
    with pytest.raises(BadInput, match="image and text"):
        read_pictures(tmp_path / "pictures.csv")
    with pytest.raises(BadInput, match="reading"):
        Course(reading=0)
    with pytest.raises(BadInput, match="lists"):
        Course(lists=1.5)
    with pytest.raises(BadInput, match="rate"):
        Course(rate=-1.0)


def test_the_command_says_what_is_missing_and_measures_only_what_sees(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    runner = CliRunner()
    assert "--out" in str(runner.invoke(app, ["train", "eyes", str(checkpoint("llama-mha-tied"))]).exception)
    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    (tmp_path / "pictures.csv").write_text("image,text\nwhite.png,nothing here\n")
    arguments = ["--evaluate", "--count", "0", "--pictures", str(tmp_path / "pictures.csv")]
    blind = runner.invoke(app, ["train", "eyes", str(checkpoint("llama-mha-tied")), *arguments])
    assert isinstance(blind.exception, ImagesNotSupported)
    seeing = runner.invoke(app, ["train", "eyes", "tiny-llava", *arguments])
    assert seeing.exit_code == 0
    assert "of 2" in seeing.output


def test_orthogonal_steps_have_equal_singular_values_and_keep_directions() -> None:
    torch.manual_seed(0)
    for shape in ((40, 40), (30, 90), (90, 30)):
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        matrix = left @ torch.logspace(0, -1.5, min(shape)).diag() @ right
        found = left.t() @ orthogonal(matrix) @ right.t()
        assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.3)).all()
        assert (found - found.diagonal().diag()).abs().max() < 1e-3


def test_muon_learns_goes_on_and_leaves_vectors_to_adamw() -> None:
    def trained(steps: int, state: dict[str, object] | None = None) -> tuple[torch.nn.Linear, dict[str, object]]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
        if state is not None:
            layer.load_state_dict(state["layer"])
        optimizer = Muon(layer.parameters(), lr=0.02)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
        for _ in range(steps):
            inputs = torch.linspace(-1, 1, 80).view(10, 8).sin()
            (layer(inputs) - inputs.flip(1) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer, {"layer": copy.deepcopy(layer.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}

    def loss(layer: torch.nn.Linear) -> float:
        inputs = torch.linspace(-1, 1, 80).view(10, 8).sin()
        return float((layer(inputs) - inputs.flip(1) - 1).detach().square().mean())

    whole, _ = trained(60)
    assert loss(whole) < 0.2 * loss(trained(0)[0])
    resumed, _ = trained(30, trained(30)[1])
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)
