"""Trains eyes: a small vision tower and projector that name the letters they see to a frozen language model.

Two stages. First the language model is given the tokens that stand in pictures, and what follows them in an image's
places is fitted until it reads them. Then, without the language model, tower and projector learn to name the letters
of a patch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ..engine.models.vision.letters import text_of
from ..engine.models.vision.spelling import Lexicon, words_of
from .eyes_lesson import letters_loss
from .eyes_model import SHRUNK, SIDE, Eyes, eyes_config, image_token, pixels_of, save_eyes
from .eyes_quality import words_read
from .eyes_speech import Blank, Reader, exercise
from .eyes_texts import Texts
from .loop import SAVE_SECONDS, Progress, fingerprint, train
from .muon import Muon
from .outcome import Folder, device_and_versions
from .pictures import OTHERS, Painter, Phrases, Picture, Style, drawn, letter_fonts
from .recipe import Recipe

_READ = 6  # pictures in a step that goes through the language model
_LONGEST_QUESTION = 110  # characters, which fill the lines of a list
_BLANK_RATE = 0.02
_STRUNG = 0.5  # share of lines of single words; the others are of texts
_CHECKED = 32  # pictures that the card's figure is of


@dataclass(frozen=True)
class Course:
    """How eyes are trained. reading, letters: steps of the two stages. batch: pictures of a step on letters. lists:
    the share of pictures in FigStep's style.

    Raises `BadInput` for values out of range.
    """

    reading: int = 200
    letters: int = 3000
    batch: int = 32
    rate: float = 2e-3
    lists: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("reading", "letters"):
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
    """said: by style, the share of words of `_CHECKED` new pictures that their patches say."""

    base: str
    course: Course
    parameters: int
    fonts: tuple[str, ...]
    list_fonts: tuple[str, ...]
    texts: int
    words: int
    losses: tuple[list[float], ...]
    said: dict[Style, float]
    versions: str

    def to_markdown(self) -> str:
        course = self.course
        done = [
            f"{len(losses)} {what} (loss {_mean(losses[: len(losses) // 10 + 1]):.2f} to "
            f"{_mean(losses[-(len(losses) // 10 + 1) :]):.2f})"
            for what, losses in zip(
                (
                    "through the language model, to be read",
                    f"of {course.batch} pictures, for letters",
                ),
                self.losses,
                strict=True,
            )
        ]
        said = ", ".join(f"{share:.1%} of {style}s" for style, share in self.said.items())
        return (
            f"# Eyes for {self.base}\n\n"
            f"A SigLIP tower and a projector, {self.parameters / 1e6:.1f} M parameters, LLaVA's architecture: an "
            f"image is shrunk to {SHRUNK} x {SHRUNK} pixels, loses its margin and becomes {SIDE * SIDE} tokens. A "
            "patch names its letters; tokens of what they spell come first, then what lets the language model read "
            "them, which is as it was. The eyes read printed lines and simple colored shapes, nothing else.\n\n"
            f"Trained on {course.letters * course.batch:,} pictures, drawn for the purpose, "
            f"{course.lists:.0%} of them lists as FigStep sets them, in {', '.join(self.list_fonts)}, the others "
            f"pages, banners and scenes, in {', '.join(self.fonts)}. Their words are windows of {self.texts:,} texts "
            f"and {self.words:,} words of the model's own vocabulary.\n\n"
            f"Steps: {'; '.join(done)}; means of the first and last tenth. Muon, rate {course.rate:g}, seed "
            f"{course.seed}. Words that patches say, of {_CHECKED} new pictures "
            f"each of held-out texts: {said}.\n\n"
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
    """Train eyes for a language model; write them, apart from it, and their card.

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
    content = open_checkpoint(source).content_hash()
    run = fingerprint(content, course, texts.digest, painter.phrases.words, [file.name for file in fonts])

    def learn(
        what: str,
        groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
        examples: int,
        loss: Callable[[list[int]], Tensor],
        recipe: Recipe,
        optimizer_type: type[torch.optim.AdamW],
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

    reader = Reader(language, tokenizer, token)
    short = [pair for pair in texts.answered if len(pair[0]) <= _LONGEST_QUESTION and pair[0].isascii()]
    blank = Blank(reader.blank).to(device)
    read = learn(
        "to be read",
        [({"shared": blank.shared}, _BLANK_RATE), ({"each": blank.each}, _BLANK_RATE / 5)],
        course.reading * _READ,
        lambda numbers: reader.loss(
            blank(), [exercise(painter, short, str(course.seed), number) for number in numbers]
        ),
        Recipe(rate=_BLANK_RATE, epochs=1, batch=_READ, seed=course.seed, adapter="full", weight_decay=0.0),
        torch.optim.AdamW,
    )
    config = eyes_config(language.config, tokenizer.convert_tokens_to_ids(token))
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        eyes = Eyes(config).to(device)
    lettered = learn(
        "letters",
        [(eyes.learning(), course.rate)],
        course.letters * course.batch,
        lambda numbers: letters_loss(
            eyes, [drawn(painter, f"{course.seed} letters", number) for number in numbers], dtype, device
        ),
        course.recipe,
        Muon,
    )
    held_out = painter_of(tokenizer, texts, fonts, course.lists, held_out=True)
    styles: tuple[Style, ...] = ("list", *OTHERS)
    lexicon, said = Lexicon(words_of(tokenizer)), {}
    for style in styles:
        rng = random.Random(f"{course.seed} held out")
        pictures = [held_out.draw(rng, style) for _ in range(_CHECKED)]
        said[style] = _share_said(eyes, lexicon, pictures, dtype, device)
    card = EyesCard(
        base=str(base),
        course=course,
        parameters=sum(value.numel() for value in eyes.parameters()),
        fonts=tuple(file.stem for file in fonts),
        list_fonts=tuple(file.stem for file in painter.list_fonts),
        texts=len(painter.phrases.texts),
        words=len(painter.phrases.words),
        losses=(read, lettered),
        said=said,
        versions=device_and_versions(dtype, device),
    )
    save_eyes(eyes, blank(), config, folder.new)
    folder.finish(card.to_markdown())
    return card


def painter_of(tokenizer: Any, texts: Texts, fonts: Sequence[Path], lists: float, held_out: bool = False) -> Painter:
    """What draws pictures of the words to learn from, or of the held-out texts' alone (single words where there are
    none)."""
    words = [word for word in words_of(tokenizer) if word.islower()]
    phrases = Phrases.of(texts.held_out, words, 0.0) if held_out else Phrases.of(texts.train, words, _STRUNG)
    return Painter(fonts, letter_fonts(fonts), phrases, SHRUNK, lists)


@torch.no_grad()
def _share_said(
    eyes: Eyes, lexicon: Lexicon, pictures: Sequence[Picture], dtype: torch.dtype, device: torch.device
) -> float:
    """The share of the pictures' words that their patches say, in order."""
    named = eyes.computed(dtype, pixels_of([picture.image for picture in pictures]).to(device)).float().cpu()
    right, all = 0, 0
    for picture, letters in zip(pictures, named, strict=True):
        found, of = words_read(picture.text, text_of(letters, lexicon))
        right, all = right + found, all + of
    return right / max(1, all)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
