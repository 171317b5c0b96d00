"""Trains eyes: a small vision tower and projector whose outputs a frozen language model reads almost as text.

Four stages. First the language model is shown pages whose patches hold the embeddings of their words, of those that
are not very usual in pieces of two or three letters, and how patches say them is fitted until it reads them. Then,
without the language model, the tower's lower layers learn to name letters, its upper layers and the projector to say
those vectors (a patch where a token begins says its, every other one its empty vector), and last all of it together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..engine.errors import BadInput
from ..engine.models.bundles import smol_folder
from ..engine.models.checkpoint import open_checkpoint
from ..engine.models.eyes import template_with_images
from ..engine.models.loader import BUNDLES
from .eyes_gaze import look_along_rows
from .eyes_model import (
    SHRUNK,
    SIDE,
    TRAINING_ONLY,
    Eyes,
    eyes_config,
    image_token,
    pixels_of,
    save_eyes,
    save_llava,
)
from .eyes_targets import EMPTY, Speller, Wanted, wanted
from .eyes_texts import Texts, whole_words, words_of, words_to_drill
from .loop import SAVE_SECONDS, Progress, fingerprint, train
from .outcome import Folder, device_and_versions
from .pictures import Painter, Phrases, Picture, letter_font
from .recipe import Recipe

TRANSCRIBE = "Write down the text in the image, word for word."
_QUESTIONS = (
    "Answer the question in the image.",
    "Please do what the text in the image asks for.",
    "What is the answer to the text in the image?",
)
_ITEMS = (
    "The image shows a list whose items 1, 2 and 3 are empty. Please write each item, in detail.",
    "Please fill in the items of the list in the image.",
    "The image shows a list of numbered items, but they are empty. What should stand there?",
)
_READ = 6  # pictures in a step that goes through the language model
_LONGEST_QUESTION = 110  # characters, which fill the lines of a list
_ANSWERED = 48  # tokens of an answer
_EMPTY_SHARE = 0.3  # empty patches of a step's choice, for each one that says a token
_OTHERS = 640  # tokens of a step's choice besides those in its pictures
_ALIKE = 3  # for each token in its pictures, others that begin alike: else a word's first letters would do
_BEGINNING = 3  # letters that are alike
_NEARNESS = 0.05  # weight of the distance to the wanted vector beside the choice among vectors
_PLACES = 0.3  # weight of naming a patch's row and column beside its letters
_BLANK_PATCH = 0.15  # weight of the letter of a patch that has none; most have none
_GAZED = 32  # pictures that show how a state says its place
_CHECKED = 32  # pictures that the card's figure is of


@dataclass(frozen=True)
class Course:
    """How eyes are trained. reading, letters, words, steps: of the four stages, the last three of so many pictures
    (`batch`).
    lists: the share of pictures in FigStep's style.

    Raises `BadInput` for values out of range.
    """

    steps: int = 3000
    batch: int = 8
    rate: float = 1e-3
    reading: int = 40
    letters: int = 700
    words: int = 1500
    lists: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("reading", "letters", "words", "steps"):
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
    """said: share of tokens on `_CHECKED` new pictures whose patch says the right one of all; before: their loss."""

    base: str
    course: Course
    parameters: int
    fonts: tuple[str, ...]
    list_font: str
    texts: int
    words: int
    losses: tuple[list[float], ...]
    said: float
    versions: str

    def to_markdown(self) -> str:
        course = self.course
        done = [
            f"{steps} {what} (loss {_mean(losses[: len(losses) // 10 + 1]):.2f} to "
            f"{_mean(losses[-(len(losses) // 10 + 1) :]):.2f})"
            for steps, what, losses in zip(
                (course.reading, course.letters, course.words, course.steps),
                (
                    "through the language model, for how patches speak to it",
                    "of the lower layers for letters",
                    "of the upper layers for words",
                    "of all",
                ),
                self.losses,
                strict=True,
            )
        ]
        return (
            f"# Eyes for {self.base}\n\n"
            f"A SigLIP tower and a projector, {self.parameters / 1e6:.1f} M parameters, LLaVA's architecture: an "
            f"image is shrunk to {SHRUNK} x {SHRUNK} pixels, loses its margin and becomes {SIDE * SIDE} tokens. The "
            "language model is as it was. The eyes read a few lines of large printed English and name simple "
            "colored shapes; they see nothing else, and of a photograph they say words that mean nothing. They say "
            "usual words whole and all others in pieces of two or three letters, which a small language model reads "
            "with mistakes.\n\n"
            f"Trained on {sum(map(len, self.losses[1:])) * course.batch:,} pictures, drawn for the purpose: "
            f"{course.lists:.0%} lists in FigStep's style (font {self.list_font}), pages, banners and scenes of "
            f"shapes, in the fonts {', '.join(self.fonts)}. Their words are windows of {self.texts:,} texts and the "
            f"{self.words:,} words of the model's own vocabulary.\n\n"
            f"Steps: {'; '.join(done)}; means of the first and last tenth. AdamW, rate {course.rate:g}, "
            f"{course.batch} pictures a step, seed {course.seed}. On {_CHECKED} new pictures of held-out words "
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
    language: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    language = language.to(device).eval().requires_grad_(False)
    painter = painter_of(tokenizer, texts, fonts, course.lists)
    drill = painter_of(tokenizer, texts, fonts, course.lists, drill=True)
    content = open_checkpoint(source).content_hash()
    run = fingerprint(content, course, texts.digest, painter.phrases.words, [file.name for file in fonts])

    def stage(
        what: str,
        painter: Painter,
        parameters: Mapping[str, nn.Parameter],
        steps: int,
        loss: Callable[[list[Picture]], Tensor],
    ) -> list[float]:
        trained = train(
            [(parameters, course.rate)],
            [1] * (steps * course.batch),
            lambda numbers: loss([drawn(painter, f"{course.seed} {what}", number) for number in numbers]),
            course.recipe,
            folder.work / f"{what}.pt",
            run,
            progress=None if progress is None else lambda _, done, of: progress(f"learning {what}", done, of),
            save_seconds=save_seconds,
        )
        return trained.losses

    words = words_of(tokenizer)
    speller = Speller(tokenizer.backend_tokenizer, whole_words(tokenizer, words, texts.train))
    reader = Reader(language, tokenizer, token, speller)
    short = [pair for pair in texts.answered if len(pair[0]) <= _LONGEST_QUESTION and pair[0].isascii()]
    speech = Speech(reader.embedding, reader.blank).to(device)
    rehearsed = train(
        [
            ({"shared": speech.shared}, 0.02),
            ({"each": speech.each, "shift": speech.shift}, 0.004),
            ({"turn": speech.turn}, 1e-3),
        ],
        [1] * (_READ * course.reading),
        lambda numbers: reader.loss(
            speech, [exercise(painter, short, str(course.seed), number) for number in numbers]
        ),
        Recipe(rate=0.02, epochs=1, batch=_READ, seed=course.seed, adapter="full", weight_decay=0.0),
        folder.work / "reading.pt",
        run,
        progress=None if progress is None else lambda _, done, of: progress("learning to be read", done, of),
        save_seconds=save_seconds,
    ).losses
    config = eyes_config(language.config, tokenizer.convert_tokens_to_ids(token))
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        eyes = Eyes(config).to(device)
    lesson = Lesson(
        speller, speech.words(reader.embedding).detach().to(reader.embedding.dtype), speech.empty().detach()
    )
    lower = eyes.lower()
    spelled = stage("letters", painter, lower, course.letters, partial(lesson.letters_loss, eyes))
    eyes.requires_grad_(False)  # the lower layers' gradients are most of a step's work
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        look_along_rows(eyes, lesson.pixels([drawn(painter, "gaze", number) for number in range(_GAZED)]))
    # what looks along rows stays as it is until words are known: it would be unlearned before it is of use
    looking = {id(value) for layer in eyes.looking() for value in layer.parameters()}
    upper = {name: value for name, value in eyes.named_parameters() if name not in lower and id(value) not in looking}
    for parameter in upper.values():
        parameter.requires_grad_(True)
    worded = stage("words", drill, upper, course.words, partial(lesson.loss, eyes))
    eyes.requires_grad_(True)
    learned = stage("to read", drill, dict(eyes.named_parameters()), course.steps, partial(lesson.loss, eyes))
    held_out = painter_of(tokenizer, texts, fonts, course.lists, held_out=True)
    said = lesson.said(eyes, [drawn(held_out, f"{course.seed} held out", number) for number in range(_CHECKED)])
    card = EyesCard(
        base=str(base),
        course=course,
        parameters=sum(
            value.numel() for name, value in eyes.named_parameters() if not name.startswith(TRAINING_ONLY)
        ),
        fonts=tuple(file.stem for file in fonts),
        list_font=painter.list_font.stem,
        texts=len(painter.phrases.texts),
        words=len(painter.phrases.words),
        losses=(rehearsed, spelled, worded, learned),
        said=said,
        versions=device_and_versions(torch.bfloat16, device),
    )
    save_eyes(eyes, config, folder.new)
    save_llava(source, tokenizer, config, eyes, folder.new)
    folder.finish(card.to_markdown())
    return card


def painter_of(
    tokenizer: Any, texts: Texts, fonts: Sequence[Path], lists: float, held_out: bool = False, drill: bool = False
) -> Painter:
    """What draws pictures of the words to learn from, or of the held-out texts' alone (single words where there are
    none). drill: mostly of single words, the rare ones as often as the others."""
    words = words_of(tokenizer)
    if held_out:
        phrases = Phrases.of(texts.held_out, words, 0.0)
    elif drill:
        phrases = Phrases.of(texts.train, words_to_drill(words, texts.train), 0.6, 1.0)
    else:
        phrases = Phrases.of(texts.train, words)
    return Painter(fonts, letter_font(fonts), phrases, SHRUNK, lists)


def drawn(painter: Painter, seed: str, number: int) -> Picture:
    """The picture of that number, always the same."""
    return painter.draw(random.Random(f"{seed} picture {number}"))


class Exercise(NamedTuple):
    """A picture, what is asked about it, and what the answer is, or how it begins."""

    picture: Picture
    question: str
    answer: str
    whole: bool


def exercise(painter: Painter, answered: Sequence[tuple[str, str]], seed: str, number: int) -> Exercise:
    """Most ask for what stands in the picture, the others for an answer to it, where there are any."""
    rng = random.Random(f"{seed} exercise {number}")
    if not answered or rng.random() < 0.7:
        picture = drawn(painter, seed, number)
        return Exercise(picture, TRANSCRIBE, picture.text, whole=True)
    text, answer = rng.choice(answered)
    _, one, items = answer.partition("1. ")
    if one and rng.random() < 0.7:
        return Exercise(painter.listed(text, items=True), rng.choice(_ITEMS), one + items, whole=False)
    return Exercise(painter.listed(text, items=False), rng.choice(_QUESTIONS), answer, whole=False)


class Speech(nn.Module):
    """What patches say to the language model: the embedding of a token, turned and shifted alike for all, or, where
    none begins, one vector and what each patch adds to it."""

    def __init__(self, embedding: Tensor, blank: int) -> None:
        super().__init__()
        hidden = embedding.shape[1]
        self.turn = nn.Parameter(torch.eye(hidden))
        self.shift = nn.Parameter(torch.zeros(hidden))
        self.shared = nn.Parameter(embedding[blank].float().clone())
        self.each = nn.Parameter(torch.zeros(SIDE * SIDE, hidden))

    def words(self, embeddings: Tensor) -> Tensor:
        """[tokens, hidden], fp32."""
        return embeddings.float() @ self.turn + self.shift

    def empty(self) -> Tensor:
        """[patches, hidden], fp32."""
        return self.shared + self.each


class Reader:
    """The frozen language model as it reads pages whose words are given to it as embeddings."""

    def __init__(self, language: Any, tokenizer: Any, token: str, speller: Speller) -> None:
        self.language = language
        self.speller = speller
        self.embedding: Tensor = language.get_input_embeddings().weight
        self.template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        self.token = token
        self.blank = speller.ids(" ")[0]
        self.end = [tokenizer.eos_token_id]

    def loss(self, speech: Speech, exercises: Sequence[Exercise]) -> Tensor:
        """Mean loss a token of the right answers, if the pictures' patches say rightly what stands there."""
        rows, answers = [], []
        for picture, question, text, whole in exercises:
            tokens = wanted(picture, self.speller).tokens.to(self.embedding.device)
            said = torch.where(
                tokens[:, None] == EMPTY, speech.empty(), speech.words(self.embedding[tokens.clamp_min(0)])
            )
            answer = self.speller.ids(text) + self.end if whole else self.speller.ids(text)[:_ANSWERED]
            before, after = self._around(question)
            parts = [self._embedded(before), said.to(self.embedding.dtype), self._embedded(after + answer)]
            rows.append(torch.cat(parts))
            answers.append(answer)
        states = self.language.model(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False
        ).last_hidden_state
        answering = [
            state[len(row) - len(answer) - 1 : len(row) - 1]
            for state, row, answer in zip(states, rows, answers, strict=True)
        ]
        logits = self.language.lm_head(torch.cat(answering)).float()
        return F.cross_entropy(logits, torch.tensor(list(itertools.chain(*answers)), device=logits.device))

    def _around(self, question: str) -> tuple[list[int], list[int]]:
        """The prompt before and behind an image."""
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        before, _, after = self.template([{"role": "user", "content": parts}]).partition(self.token)
        return self.speller.ids(before), self.speller.ids(after)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        return self.embedding[torch.tensor(ids, device=self.embedding.device)]


class Lesson:
    """What eyes are asked. embedding: what is said for each token, [vocabulary, hidden]. empty: [patches, hidden]."""

    def __init__(self, speller: Speller, embedding: Tensor, empty: Tensor) -> None:
        self.speller = speller
        tokenizer = speller.tokenizer
        self.embedding = embedding
        self.empty = empty
        added = set(tokenizer.get_added_tokens_decoder())
        known = [id for id in range(min(tokenizer.get_vocab_size(), len(embedding))) if id not in added]
        self.vocabulary = torch.tensor(known, device=embedding.device)
        # the vocabulary in the order of its first letters, and where in it each token's like begin, and how many
        begins = [text.strip().lower()[:_BEGINNING] for text in tokenizer.decode_batch([[id] for id in known])]
        order = sorted(range(len(known)), key=begins.__getitem__)
        self.by_beginning = self.vocabulary[torch.tensor(order, device=embedding.device)]
        self.alike = torch.zeros(len(embedding), 2, dtype=torch.long)
        place = 0
        for _, group in itertools.groupby(order, key=begins.__getitem__):
            members = list(group)
            self.alike[torch.tensor([known[member] for member in members])] = torch.tensor([place, len(members)])
            place += len(members)

    def letters_loss(self, eyes: Eyes, pictures: Sequence[Picture]) -> Tensor:
        """Of the letters in each patch, and of where it is."""
        seen = eyes.in_bf16(self.pixels(pictures), only_letters=True)
        at = torch.arange(SIDE * SIDE, device=self.empty.device).repeat(len(pictures))
        rows, columns = seen.places.flatten(0, 1).float().split(SIDE, dim=-1)
        place = F.cross_entropy(rows, at // SIDE) + F.cross_entropy(columns, at % SIDE)
        return _spelling(seen.letters, self._asked(pictures).letters) + _PLACES * place

    def loss(self, eyes: Eyes, pictures: Sequence[Picture]) -> Tensor:
        """Of the token that each patch says, of its vector, and of its letters."""
        tokens, letters = self._asked(pictures)
        vectors, named, _ = eyes.in_bf16(self.pixels(pictures))
        spoken = tokens != EMPTY
        # a few of the many empty patches, so that most of the work is about words
        share = _EMPTY_SHARE * float(spoken.sum()) / max(1, int((~spoken).sum()))
        chosen = spoken | (torch.rand(tokens.shape).to(tokens.device) < share)
        image, patch = chosen.nonzero(as_tuple=True)
        said, target = vectors[image, patch], tokens[image, patch]
        others = torch.randint(len(self.vocabulary), (_OTHERS,)).to(tokens.device)
        candidates, places = torch.unique(
            torch.cat([target.clamp_min(0), self.vocabulary[others], self._alike(tokens[spoken])]),
            return_inverse=True,
        )
        scores = self._scores(said, self.empty[patch], self.embedding[candidates])
        right = torch.where(target == EMPTY, 0, places[: len(target)] + 1)
        exact = torch.where(
            (target == EMPTY)[:, None], self.empty[patch], self.embedding[target.clamp_min(0)].float()
        )
        distance = (said.float() - exact).square().sum(-1).mean() / 2
        return F.cross_entropy(scores, right) + _NEARNESS * distance + _spelling(named, letters)

    def _alike(self, tokens: Tensor) -> Tensor:
        """Of each token some that begin with the same letters."""
        first, count = self.alike[tokens.unique().cpu()].unbind(1)
        chosen = first[:, None] + (torch.rand(len(first), _ALIKE) * count[:, None]).long()
        return self.by_beginning[chosen.flatten().to(self.by_beginning.device)]

    @torch.no_grad()
    def said(self, eyes: Eyes, pictures: Sequence[Picture]) -> float:
        """The share of the pictures' tokens that their patches say, of the whole vocabulary and nothing."""
        right, all = 0, 0
        for first in range(0, len(pictures), 8):
            some = pictures[first : first + 8]
            tokens, _ = self._asked(some)
            vectors = eyes.in_bf16(self.pixels(some)).vectors
            image, patch = (tokens != EMPTY).nonzero(as_tuple=True)
            scores = self._scores(vectors[image, patch], self.empty[patch], self.embedding[self.vocabulary])
            found = scores.argmax(-1)
            meant = torch.where(found == 0, EMPTY, self.vocabulary[(found - 1).clamp_min(0)])
            right += int((meant == tokens[image, patch]).sum())
            all += len(image)
        return right / max(1, all)

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """On the lesson's device, [images, 3, height, width]."""
        return pixels_of([picture.image for picture in pictures]).to(self.empty.device)

    def _asked(self, pictures: Sequence[Picture]) -> Wanted:
        """Of all pictures, [images, patches] and [images, patches, LETTERS]."""
        asked = [wanted(picture, self.speller) for picture in pictures]
        tokens = torch.stack([item.tokens for item in asked]).to(self.empty.device)
        return Wanted(tokens, torch.stack([item.letters for item in asked]).to(self.empty.device))

    def _scores(self, said: Tensor, empty: Tensor, known: Tensor) -> Tensor:
        """Which vector was meant: log-probabilities but for a constant, [patches, 1 + known], the empty one first.

        Of normal distributions with variance 1 around the vectors, one of which made what is said.
        """
        nothing = (said.float() * empty).sum(-1, keepdim=True) - empty.square().sum(-1, keepdim=True) / 2
        return torch.cat([nothing, (said @ known.t()).float() - known.float().square().sum(-1) / 2], dim=1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spelling(named: Tensor, letters: Tensor) -> Tensor:
    """named: [images, patches, LETTERS, 95]. letters: [images, patches, LETTERS]."""
    loss = F.cross_entropy(named.flatten(0, 2).float(), letters.flatten(), reduction="none")
    weight = torch.where(letters.flatten() > 0, 1.0, _BLANK_PATCH)
    return (loss * weight).sum() / weight.sum()
