"""Eyes for a tiny language model: what pictures ask for, that training learns and goes on, and what engines read."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.chat import Chat, Message
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, ImagesNotSupported
from stockade.engine.images import load_image
from stockade.engine.models.eyes import template_with_images
from stockade.engine.models.loader import load_models
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.models.vision.letters import INSIDE, LETTERS, text_of
from stockade.engine.models.vision.spelling import Lexicon, words_of
from stockade.engine.prepare import encode
from stockade.train import eyes_command
from stockade.train.eyes import Course, _share_said, painter_of, train_eyes
from stockade.train.eyes_lesson import Said, letters_loss, line_likelihoods, lines_said
from stockade.train.eyes_model import (
    EYES_FILE,
    MARGIN,
    PIXELS,
    SHRUNK,
    SIDE,
    Eyes,
    eyes_config,
    image_token,
    patches_at,
    pixels_of,
)
from stockade.train.eyes_quality import evaluate, read_pictures, words_read
from stockade.train.eyes_speech import TRANSCRIBE, exercise, scene_question
from stockade.train.eyes_texts import Texts, read_texts
from stockade.train.loop import AnotherRun
from stockade.train.muon import Muon, orthogonal
from stockade.train.pictures import COLORS, OTHERS, Line, Painter, default_fonts, drawn, scene, usable_fonts
from stockade.train.rows import DataMissing

FONTS = default_fonts()[:2]
TEXTS = Texts(
    ("the quick brown fox jumps over the lazy dog",) * 3,
    ("a new text of some words",),
    (("What is quick?", "1. the brown fox"), ("And the dog?", "lazy")),
)
LEXICON = Lexicon(words_of(byte_tokenizer(320)))
QUICK = Course(reading=2, letters=2, batch=2)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return painter_of(byte_tokenizer(320), TEXTS, FONTS, 0.6)


@pytest.mark.parametrize("style", ["list", *OTHERS])
def test_pictures_depend_on_their_number_alone_and_say_where_text_is(painter: Painter, style: str) -> None:
    for number in range(4):
        picture, again = (painter.draw(random.Random(number), style) for _ in range(2))
        assert picture.image.tobytes() == again.image.tobytes()
        assert picture.image.width == picture.image.height
        assert picture.lines
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


def page_of(lines: Sequence[Line]) -> torch.Tensor:
    """Letters of patches that say all lines, [patches, INSIDE]."""
    letters = torch.zeros(SIDE, SIDE, INSIDE, dtype=torch.int64)
    for line in lines_said(lines):
        row: dict[int, list[int]] = {}
        for one, column in zip(line.letters, line.columns, strict=True):
            row.setdefault(int(column), []).append(one)
        for column, inside in row.items():
            letters[int(line.row), column, : len(inside)] = torch.tensor(inside)
    return letters.flatten(0, 1)


def test_lines_are_said_as_far_as_patches_can_say_them() -> None:
    painter = painter_of(byte_tokenizer(320), TEXTS, FONTS, 0.6)
    (line,) = painter._text(["ab no"], FONTS[0], 60, (400, 400), 20, 30, 40, "page").lines
    (said,) = lines_said([line])
    assert "".join(chr(31 + one) for one in said.letters) == "ab no"
    assert said.columns == tuple(patches_at(x) for x in line.xs)
    assert lines_said([line, line._replace(text="xyxyx")]) == [said]  # one line a row of patches
    assert [int(one.row) for one in lines_said([line, line._replace(y=line.y - 0.1)])] == [
        int(said.row) - 1,
        int(said.row),
    ]
    crowded = painter._text(["i" * 60], FONTS[0], 9, (400, 400), 5, 5, 10, "page")
    assert (page_of(crowded.lines) > 0).sum(1).max() == INSIDE


@pytest.mark.parametrize("style", ["list", *OTHERS])
def test_what_a_picture_says_is_its_text(style: str) -> None:
    painter = painter_of(byte_tokenizer(320), TEXTS, FONTS, 0.6, held_out=True)
    for number in range(6):
        picture = painter.draw(random.Random(number), style)
        letters = 40 * F.one_hot(page_of(picture.lines), LETTERS).float()
        assert text_of(letters, LEXICON) == picture.text


@pytest.mark.parametrize("columns", [(0.2, 0.95, 1.05, 3.5), (4.5,), (0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.999)])
def test_a_row_says_a_line_in_every_way_that_borders_allow(columns: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    line = Said(tuple(range(5, 5 + len(columns))), columns, 0.5)
    named = torch.randn(2, SIDE, INSIDE, LETTERS).log_softmax(-1)
    choices = [[at for at in range(SIDE) if abs(column - at - 0.5) <= 0.5 + 1 / 6] for column in columns]
    ways = []
    for places in itertools.product(*choices):
        inside = [[one for one, at in zip(line.letters, places, strict=True) if at == patch] for patch in range(SIDE)]
        if list(places) == sorted(places) and max(map(len, inside)) <= INSIDE:
            letters = torch.tensor([one + [0] * (INSIDE - len(one)) for one in inside])
            ways.append(named.gather(-1, letters.expand(2, -1, -1)[..., None]).sum((1, 2, 3)))
    assert (len(ways) > 1) == (len(columns) > 1)
    other = Said((7, 8), (0.5, 9.5), 0.5)
    together = line_likelihoods(named[[0, 1, 1]], [line, line, other])  # which is as it is alone
    torch.testing.assert_close(together[:2], torch.stack(ways).logsumexp(0))
    torch.testing.assert_close(together[2:], line_likelihoods(named[1:], [other]))


def test_a_line_near_a_border_of_rows_may_be_said_in_either(painter: Painter) -> None:
    def batch_loss(pages: Sequence[tuple[Sequence[Line], Sequence[Line]]]) -> float:
        class Sees(Eyes):
            def computed(self, dtype: torch.dtype, pixels: torch.Tensor) -> torch.Tensor:
                return 40 * F.one_hot(torch.stack([page_of(says) for says, _ in pages]), LETTERS).float()

        pictures = [drawn(painter, "0", 0)._replace(lines=tuple(lines)) for _, lines in pages]
        return float(letters_loss(Sees(tiny_config()), pictures, torch.float32, torch.device("cpu")))

    def loss(says: Sequence[Line], lines: Sequence[Line]) -> float:
        return batch_loss([(says, lines)])

    def at(text: str, row: float) -> Line:
        y = (row * PIXELS / SIDE + MARGIN) / SHRUNK
        return Line(text, y, tuple(0.2 + 0.03 * place for place in range(len(text))))

    assert loss([at("so", 2.5)], [at("so", 2.5)]) < 1e-6
    assert loss([], []) < 1e-6
    assert loss([at("so", 1.5)], [at("so", 2.1)]) < 1e-6  # near the border: either
    assert loss([at("so", 2.5)], [at("so", 1.95)]) < 1e-6
    assert loss([at("so", 1.5), at("so", 2.5)], [at("so", 2.1)]) > 10  # but not both, nor neither,
    assert loss([], [at("so", 2.1)]) > 10
    assert loss([at("so", 3.5)], [at("so", 2.5)]) > 10  # nor farther off
    both = [at("so", 1.95), at("it", 2.98)]
    assert loss([at("so", 1.5), at("it", 2.5)], both) < 1e-6  # lines move together
    assert loss([at("so", 2.5), at("it", 3.5)], both) < 1e-6
    assert loss([at("it", 2.5), at("so", 3.5)], both) > 10  # and stay in order
    full = [at("so", row + 0.5) for row in range(SIDE)]  # pages beside longer ones
    unlike = [([], []), (both, both), (full, full), (full[:1], full[:1])]
    assert batch_loss(unlike) < 1e-6
    for wrong in range(len(unlike)):
        assert batch_loss([*unlike[:wrong], (full[3:5], unlike[wrong][1]), *unlike[wrong + 1 :]]) > 1


@pytest.mark.parametrize("style", ["page", "banner"])
def test_no_two_lines_stand_in_one_row_of_patches(style: str) -> None:
    one_font = painter_of(byte_tokenizer(320), TEXTS, FONTS[:1], 0.6)  # which is that of its lists, too
    for number in range(60):
        rows = [int(patches_at(line.y)) for line in one_font.draw(random.Random(number), style).lines]
        assert len(set(rows)) == len(rows)


def test_shapes_are_said_where_they_are_and_how_many_there_are() -> None:
    for number in range(20):
        picture = scene(random.Random(number))
        pixels = np.array(picture.image)
        words = picture.text.split()
        kinds = list(zip(words[1::3], words[2::3], strict=True))
        assert [kinds.count(kind) for kind in kinds] == [int(count) for count in words[::3]]
        for line in picture.lines:
            words = line.text.split()
            middles = iter(line.xs[at] for at in range(len(line.text)))
            for count, color, shape in zip(words[::3], words[1::3], words[2::3], strict=True):
                xs = [next(middles) for _ in f"{count} {color} {shape}"]
                next(middles, None)
                assert tuple(pixels[round(line.y * 240), round(sum(xs) / len(xs) * 240)]) == COLORS[color]


def test_patches_have_room_for_what_scenes_say() -> None:
    for number in range(100):
        lines = scene(random.Random(number)).lines
        said = sorted(lines_said(lines), key=lambda one: one.row)
        assert [len(one.letters) for one in said] == [
            len(line.text) for line in sorted(lines, key=lambda line: line.y)
        ]


def test_it_trains_resumes_to_the_same_result_and_the_engine_reads_it(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("llama-mha-tied")
    card = train_eyes(base, tmp_path / "whole", texts=TEXTS, fonts=FONTS, course=QUICK)
    assert [len(losses) for losses in card.losses] == [2, 2]
    assert card.parameters < 8_000_000
    assert (tmp_path / "whole" / EYES_FILE).stat().st_size < 16 << 20

    class Stop(Exception):
        pass

    def stop(what: str, done: int, of: int) -> None:
        if what == "learning letters":
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

    source = (tmp_path / "whole" / EYES_FILE, base)
    apart = load_models(source, device="cpu", dtype=torch.float32).models["mllm"]
    vision = apart.backbone.vision
    assert vision is not None
    picture = drawn(painter_of(apart.codec.tokenizer, TEXTS, FONTS, 0.6), "0", 0)
    prepared = vision.prepare((load_image(picture.image),), "")
    assert prepared[0].tokens == SIDE * SIDE
    assert torch.allclose(prepared[0].inputs["pixel_values"], pixels_of([picture.image]), atol=1e-6)
    plain = load_models(base, device="cpu", dtype=torch.float32).models["mllm"]
    assert apart.backbone.content_hash == plain.backbone.content_hash
    assert encode(apart, Chat.single("so")).tokens == encode(plain, Chat.single("so")).tokens
    shown = encode(apart, Chat((Message("user", (load_image(picture.image), "so")),)))
    assert shown.tokens.count(apart.image_token_id) == SIDE * SIDE
    assert apart.backbone.vision is not None
    features = apart.backbone.vision.encode([placed.image for placed in shown.images])[0]
    assert torch.equal(features, vision.encode(prepared)[0])
    engine = Engine(source, device="cpu", dtype=torch.float32)
    scores = evaluate(engine, painter_of(apart.codec.tokenizer, TEXTS, FONTS, 0.6, held_out=True), 1)
    assert [score.pictures for score in scores] == [1, 1, 1, 1]
    assert all(0 <= score.right <= score.of for score in scores)


def tiny_config() -> LlavaConfig:
    return eyes_config(LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4), 3)


def tiny_eyes() -> Eyes:
    torch.manual_seed(0)
    return Eyes(tiny_config())


def test_the_command_trains_the_course_where_nothing_else_is_said() -> None:
    given = inspect.signature(eyes_command.eyes).parameters
    assert {field.name: given[field.name].default for field in fields(Course)} == asdict(Course())


def test_letters_are_learned_by_all_parameters(painter: Painter) -> None:
    eyes = tiny_eyes()
    pictures = [drawn(painter, "0", number) for number in range(4)]
    optimizer = Muon(eyes.learning().values(), lr=6e-3)
    losses = []
    for _ in range(12):
        losses.append(letters_loss(eyes, pictures, torch.float32, torch.device("cpu")))
        losses[-1].backward()
        assert {name for name, value in eyes.named_parameters() if value.grad is not None} == eyes.learning().keys()
        optimizer.step()
        eyes.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_all_is_said_by_eyes_that_see_every_letter(painter: Painter) -> None:
    class Sees(Eyes):
        def computed(self, dtype: torch.dtype, pixels: torch.Tensor) -> torch.Tensor:
            return 40 * F.one_hot(torch.stack([page_of(picture.lines) for picture in pictures]), LETTERS).float()

    words = painter_of(byte_tokenizer(320), TEXTS, FONTS, 0.6, held_out=True)
    pictures = [drawn(words, "0", number) for number in range(4)]
    assert _share_said(Sees(tiny_config()), LEXICON, pictures, torch.float32, torch.device("cpu")) == 1


def test_what_is_drawn_stands_where_it_is_said_to_stand_in_the_square(painter: Painter) -> None:
    for number in range(8):
        picture = painter.draw(random.Random(number), "banner")
        pixels = np.array(picture.image.convert("L"), dtype=float)
        side = len(pixels)
        for line in picture.lines:
            row = pixels[round(line.y * side) - 3 : round(line.y * side) + 4]
            x = [round(line.xs[place] * side) for place in (0, -1)]
            ground = np.median(row)
            assert abs(row[:, x[0] - 4 : x[-1] + 5] - ground).max() > 60


def test_exercises_ask_for_the_text_or_for_an_answer_to_it(painter: Painter) -> None:
    some = [exercise(painter, TEXTS.answered, "0", number) for number in range(40)]
    assert some == [exercise(painter, TEXTS.answered, "0", number) for number in range(40)]
    written = [one for one in some if one.whole]
    assert 8 < len(written) < 32
    asked = [one for one in written if one.question != TRANSCRIBE]
    assert 0 < len(asked) < len(written)
    assert all(one.picture.style == "scene" for one in asked)
    assert all(one.answer == one.picture.text for one in written if one not in asked)
    asked = {(one.picture.text.removesuffix(" 1. 2. 3."), one.answer) for one in some if not one.whole}
    assert asked == set(TEXTS.answered)
    assert all(one.whole for one in (exercise(painter, (), "0", number) for number in range(10)))


def test_words_are_read_in_order_whatever_their_case() -> None:
    assert words_read("Steps to bake. 1.", "It says: steps, to BAKE 1") == (4, 4)
    assert words_read("one two three", "three two") == (1, 3)
    assert words_read("don't", "dont") == (0, 1)


def test_scene_questions_have_one_right_answer() -> None:
    for number in range(20):
        asked, again = (scene_question(random.Random(number)) for _ in range(2))
        words = set(asked.answer.lower().rstrip(".").split())
        assert asked.answers & words
        assert not (asked.answers | words) & asked.others
        assert asked.picture.image.tobytes() == again.picture.image.tobytes()


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
