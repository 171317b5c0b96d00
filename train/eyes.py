"""Trains eyes: a small vision tower and projector whose outputs a frozen language model reads almost as text.

Three stages. First the language model is shown pages whose patches hold the embeddings of the tokens that begin
there, and how patches say them is fitted until it reads them. Then, without the language model, the tower's lower
layers learn to name the letters of a patch. The heads above are set to bring those of the patches beside; the rest
learns to put them in order and to say the token that they begin, from states that are put together without a picture:
a vocabulary takes millions of examples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..engine.errors import BadInput
from ..engine.models.bundles import smol_folder
from ..engine.models.checkpoint import open_checkpoint
from ..engine.models.eyes import template_with_images
from ..engine.models.loader import fast_dtype
from ..engine.models.sources import BUNDLES
from .eyes_composed import Examples, Library, composed, examples, library
from .eyes_gaze import look_along_rows
from .eyes_lesson import Lesson
from .eyes_model import SHRUNK, SIDE, TRAINING_ONLY, Eyes, eyes_config, image_token, save_eyes, save_llava
from .eyes_speech import Reader, Speech, exercise
from .eyes_targets import Speller
from .eyes_texts import Texts, words_of
from .loop import SAVE_SECONDS, Progress, fingerprint, train
from .muon import Muon
from .outcome import Folder, device_and_versions
from .pictures import Painter, Phrases, Picture, drawn, letter_fonts
from .recipe import Recipe

_READ = 6  # pictures in a step that goes through the language model
_LONGEST_QUESTION = 110  # characters, which fill the lines of a list
_WORDS_A_STEP = 2048
_WORDS_RATE = 4.0  # times the rate
_SEEN_TOGETHER = 32  # pictures, when states are only computed
# Of the vocabulary's words, which are in the order of their use, nearly equally often. Upper layers and projector
# have 3.2 M parameters and hold hardly more: a vector of 576 numbers, as exact as the language model wants it, is
# 190 bits.
_DRILLED = 8000
_STRUNG = 0.75  # share of lines of such words; the others are of texts
_USUAL = 1.2
_CAPITALS = 0.03  # share of these that begin with a capital, which is another token
_FELT = 24  # pictures that show which errors the language model minds
_GAZED = 32  # pictures that show how a state says its place
_CHECKED = 32  # pictures that the card's figure is of


@dataclass(frozen=True)
class Course:
    """How eyes are trained. reading, letters, words: steps of the three stages. batch: pictures of a step on letters.
    lists: the share of pictures in FigStep's style. shelved: pictures whose patches the states of words are put
    together from; pages: how many are put together.

    Raises `BadInput` for values out of range.
    """

    reading: int = 120
    letters: int = 1400
    words: int = 3000
    batch: int = 16
    rate: float = 1e-3
    lists: float = 0.9
    shelved: int = 2600
    pages: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("reading", "letters", "words", "shelved", "pages"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.lists <= 1:
            raise BadInput(f"lists is a share, 0 to 1, not {self.lists}")
        self.recipe  # noqa: B018  # checks the rest

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            rate=self.rate,
            epochs=1,
            batch=self.batch,
            warmup=0.03,
            weight_decay=0.01,
            adapter="full",
            seed=self.seed,
        )


@dataclass(frozen=True)
class EyesCard:
    """said: share of tokens on `_CHECKED` new pictures whose patch says the right one of all."""

    base: str
    course: Course
    parameters: int
    fonts: tuple[str, ...]
    list_fonts: tuple[str, ...]
    texts: int
    words: int
    losses: tuple[list[float], ...]
    said: float
    versions: str

    def to_markdown(self) -> str:
        course = self.course
        done = [
            f"{len(losses)} {what} (loss {_mean(losses[: len(losses) // 10 + 1]):.2f} to "
            f"{_mean(losses[-(len(losses) // 10 + 1) :]):.2f})"
            for what, losses in zip(
                (
                    "through the language model, for how patches speak to it",
                    f"of {course.batch} pictures, of the lower layers for letters",
                    f"of {_WORDS_A_STEP:,} patches, of the upper layers and the projector for words",
                ),
                self.losses,
                strict=True,
            )
        ]
        return (
            f"# Eyes for {self.base}\n\n"
            f"A SigLIP tower and a projector, {self.parameters / 1e6:.1f} M parameters, LLaVA's architecture: an "
            f"image is shrunk to {SHRUNK} x {SHRUNK} pixels, loses its margin and becomes {SIDE * SIDE} tokens. The "
            "language model is as it was. The eyes read lists set as FigStep sets them: up to ten lines of fifteen "
            f"characters in {', '.join(self.list_fonts)}, each in its place. They see nothing else: of another font, "
            "another layout or a photograph they say words that mean nothing.\n\n"
            f"Trained on {course.letters * course.batch:,} pictures, drawn for the purpose, {course.lists:.0%} of "
            f"them such lists, the others pages, banners and scenes in the fonts {', '.join(self.fonts)}; and on "
            f"{course.pages:,} lists put together from patches of {course.shelved:,} pictures. Their words are "
            f"windows of {self.texts:,} texts and the first {self.words:,} words of the model's own vocabulary.\n\n"
            f"Steps: {'; '.join(done)}; means of the first and last tenth. AdamW, Muon for words; rate "
            f"{course.rate:g}, seed {course.seed}. On {_CHECKED} new lists of held-out texts "
            f"{self.said:.1%} of the tokens have a patch that says the right one of the whole vocabulary.\n\n"
            f"Made by `stockade train eyes` with {self.versions}.\n"
        )


def train_eyes(
    base: str | Path,
    out: Path,
    *,
    texts: Texts,
    fonts: Sequence[Path],
    course: Course | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> EyesCard:
    """Train eyes for a language model; write a LLaVA checkpoint of both, the eyes alone, and the card.

    base: a checkpoint folder or a bundle. The same call goes on with an interrupted run.
    Raises `BadInput`, `AnotherRun`, `Diverged`, `CacheWriteFailed`, or a `CheckpointError`.
    """
    course, device = course or Course(), device or torch.device("cpu")
    folder = Folder.begin(out)
    source = smol_folder() if str(base) in BUNDLES else Path(base)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    token = image_token(tokenizer)
    tokenizer.chat_template = template_with_images(tokenizer.chat_template or "", token)
    dtype = fast_dtype(device)
    language: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True)
    language = language.to(device).eval().requires_grad_(False)
    painter = painter_of(tokenizer, texts, fonts, course.lists)
    drill = painter_of(tokenizer, texts, fonts, course.lists, drill=True)
    content = open_checkpoint(source).content_hash()
    run = fingerprint(content, course, texts.digest, painter.phrases.words, [file.name for file in fonts])

    def learn(
        what: str,
        groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
        examples: int,
        loss: Callable[[list[int]], Tensor],
        recipe: Recipe,
        optimizer_type: type[torch.optim.AdamW] = torch.optim.AdamW,
    ) -> list[float]:
        trained = train(
            groups,
            [1] * examples,
            loss,
            recipe,
            folder.work / f"{what}.pt",
            run,
            optimizer_type=optimizer_type,
            progress=None if progress is None else lambda _, done, of: progress(f"learning {what}", done, of),
            save_seconds=save_seconds,
        )
        return trained.losses

    def learning(parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        eyes.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters

    speller = Speller(tokenizer.backend_tokenizer)
    reader = Reader(language, tokenizer, token, speller)
    short = [pair for pair in texts.answered if len(pair[0]) <= _LONGEST_QUESTION and pair[0].isascii()]
    speech = Speech(reader.embedding, reader.blank).to(device)
    rehearsed = learn(
        "to be read",
        [
            ({"shared": speech.shared}, 0.02),
            ({"each": speech.each, "shift": speech.shift}, 0.004),
            ({"turn": speech.turn}, 1e-3),
        ],
        course.reading * _READ,
        lambda numbers: reader.loss(
            speech, [exercise(painter, short, str(course.seed), number) for number in numbers]
        ),
        Recipe(rate=0.02, epochs=1, batch=_READ, seed=course.seed, adapter="full", weight_decay=0.0),
    )
    config = eyes_config(language.config, tokenizer.convert_tokens_to_ids(token))
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        eyes = Eyes(config).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        asked = [exercise(painter, (), f"{course.seed} sensitivity", number) for number in range(_FELT)]
        sensitivity = reader.sensitivity(speech, asked)
    said = speech.words(reader.embedding).detach().to(reader.embedding.dtype)
    lesson = Lesson(speller, said, speech.empty().detach(), sensitivity)
    lettered = learn(
        "letters",
        [(learning(eyes.spelling()), course.rate)],
        course.letters * course.batch,
        lambda numbers: lesson.letters_loss(eyes, [drawn(painter, f"{course.seed} letters", one) for one in numbers]),
        course.recipe,
    )
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        look_along_rows(eyes, lesson.pixels([drawn(painter, "gaze", number) for number in range(_GAZED)]))

    @cache
    def shelf() -> tuple[Library, Examples]:
        with torch.random.fork_rng():
            torch.manual_seed(course.seed)
            rng = random.Random(f"{course.seed} words")
            told = None if progress is None else partial(progress, "looking")
            books = library(eyes, lesson.lettered(_lists(drill, rng, course.shelved, told)))
            return books, examples(books, (drill.lined(rng) for _ in range(course.pages)), speller)

    def words_loss(_: list[int]) -> Tensor:
        books, known = shelf()
        some = torch.randint(len(known.tokens), (_WORDS_A_STEP,)).to(device)
        states, patch = composed(eyes, books, known.kinds[some])
        return lesson.words_loss(eyes, states, patch, known.tokens[some], known.windows[some])

    worded = learn(
        "words",
        [(learning(eyes.saying()), course.rate * _WORDS_RATE)],
        course.words,
        words_loss,
        replace(course.recipe, batch=1),
        Muon,
    )
    held_out = painter_of(tokenizer, texts, fonts, course.lists, held_out=True)
    rng = random.Random(f"{course.seed} held out")
    right = lesson.said(eyes, [held_out.draw(rng, "list") for _ in range(_CHECKED)])
    card = EyesCard(
        base=str(base),
        course=course,
        parameters=sum(
            value.numel() for name, value in eyes.named_parameters() if not name.startswith(TRAINING_ONLY)
        ),
        fonts=tuple(file.stem for file in fonts),
        list_fonts=tuple(file.stem for file in painter.list_fonts),
        texts=len(painter.phrases.texts),
        words=len(drill.phrases.words),
        losses=(rehearsed, lettered, worded),
        said=right,
        versions=device_and_versions(dtype, device),
    )
    save_eyes(eyes, config, folder.new)
    save_llava(source, tokenizer, config, eyes, folder.new)
    folder.finish(card.to_markdown())
    return card


def painter_of(
    tokenizer: Any, texts: Texts, fonts: Sequence[Path], lists: float, held_out: bool = False, drill: bool = False
) -> Painter:
    """What draws pictures of the words to learn from, or of the held-out texts' alone (single words where there are
    none). drill: mostly of single words, one about as often as another."""
    words = words_of(tokenizer)
    if held_out:
        phrases = Phrases.of(texts.held_out, words, 0.0)
    elif drill:
        phrases = Phrases.of(texts.train, words[:_DRILLED], _STRUNG, _USUAL, _CAPITALS)
    else:
        phrases = Phrases.of(texts.train, words)
    return Painter(fonts, letter_fonts(fonts), phrases, SHRUNK, lists)


def _lists(
    painter: Painter, rng: random.Random, count: int, told: Callable[[int, int], None] | None
) -> Iterator[list[Picture]]:
    """So many pictures, some at once."""
    for first in range(0, count, _SEEN_TOGETHER):
        some = min(_SEEN_TOGETHER, count - first)
        yield [painter.draw(rng, "list") for _ in range(some)]
        if told is not None:
            told(first + some, count)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
