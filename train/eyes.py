"""Trains eyes: a small vision tower and projector whose outputs a frozen language model reads almost as text.

Four stages. First the language model is shown pages whose patches hold the embeddings of the tokens that begin there,
and how patches say them is fitted until it reads them. Then, without the language model, the tower's lower layers
learn to name the letters of a patch. The heads above are set to bring those of the patches beside; the rest learns
to put them in order and to say the token that they begin, from states that are computed once: a vocabulary takes
millions of examples. Last all of it learns together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
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
from ..engine.models.loader import fast_dtype
from ..engine.models.sources import BUNDLES
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
from .eyes_texts import Texts, words_of
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
_OTHERS = 384  # tokens of a step's choice besides those that are right
_ALIKE = 2  # for each token in its pictures, others that begin alike: else a word's first letters would do
_BEGINNING = 3  # letters that are alike
# Of a vector that is said. Squares of distances between `smol`'s vectors are 13, to the nearest 4: with a variance of
# 1 even the exact vector leaves doubts, and blends of several cost little more.
_VARIANCE = 0.25
_NEARNESS = 0.2  # weight of the distance to the wanted vector beside the choice among vectors
_PLACES = 0.3  # weight of naming a patch's row and column beside its letters
_BLANK_PATCH = 0.15  # weight of the letter of a patch that has none; most have none
_KEPT = 24  # patches of a picture whose states are kept to learn words from,
_KEPT_TOKENS = 20  # and so many of them at most where tokens begin
_SEEN_TOGETHER = 32  # pictures, when states are only computed
_WORDS_A_STEP = 512
_WORDS_AGAIN = 4  # times each is learned from; what is seen more often is known by its picture, not by its letters
_WORDS_RATE = 0.6  # of the rate
_LAST_RATE = 0.2  # of the rate, when all learns together: words have to stay known
# Of the vocabulary's words, which are in the order of their use, nearly equally often. Upper layers and projector
# have 2.3 M parameters and hold hardly more: a vector of 576 numbers, as exact as the language model wants it, is
# 190 bits.
_DRILLED = 5000
_CAPITALS = 0.03  # share of these that begin with a capital, which is another token
_GAZED = 32  # pictures that show how a state says its place
_CHECKED = 32  # pictures that the card's figure is of


@dataclass(frozen=True)
class Course:
    """How eyes are trained. reading, letters, words, steps: of the four stages, the last three of so many pictures
    (`batch`).
    lists: the share of pictures in FigStep's style.

    Raises `BadInput` for values out of range.
    """

    steps: int = 2600
    batch: int = 16
    rate: float = 1e-3
    reading: int = 120
    letters: int = 1400
    words: int = 6000
    lists: float = 0.9
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
        pictures = (course.letters + course.words + course.steps) * course.batch
        done = [
            f"{steps} {what} (loss {_mean(losses[: len(losses) // 10 + 1]):.2f} to "
            f"{_mean(losses[-(len(losses) // 10 + 1) :]):.2f})"
            for steps, what, losses in zip(
                (course.reading, course.letters, len(self.losses[2]), course.steps),
                (
                    "through the language model, for how patches speak to it",
                    "of the lower layers for letters",
                    f"of {_WORDS_A_STEP:,} patches, of the upper layers and the projector for words",
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
            "colored shapes; they see nothing else, and of a photograph they say words that mean nothing.\n\n"
            f"Trained on {pictures:,} pictures, drawn for the purpose: "
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
        recipe: Recipe = course.recipe,
    ) -> list[float]:
        trained = train(
            groups,
            [1] * examples,
            loss,
            recipe,
            folder.work / f"{what}.pt",
            run,
            progress=None if progress is None else lambda _, done, of: progress(f"learning {what}", done, of),
            save_seconds=save_seconds,
        )
        return trained.losses

    def pictured(
        what: str,
        painter: Painter,
        parameters: Mapping[str, nn.Parameter],
        steps: int,
        loss: Callable[[Eyes, list[Picture]], Tensor],
        rate: float = course.rate,
    ) -> list[float]:
        eyes.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return learn(
            what,
            [(parameters, rate)],
            steps * course.batch,
            lambda numbers: loss(eyes, [drawn(painter, f"{course.seed} {what}", number) for number in numbers]),
        )

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
    lesson = Lesson(
        speller, speech.words(reader.embedding).detach().to(reader.embedding.dtype), speech.empty().detach()
    )
    lettered = pictured("letters", painter, eyes.spelling(), course.letters, lesson.letters_loss)
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        look_along_rows(eyes, lesson.pixels([drawn(painter, "gaze", number) for number in range(_GAZED)]))
    eyes.requires_grad_(False)
    for parameter in eyes.saying().values():
        parameter.requires_grad_(True)

    @cache
    def kept() -> Kept:
        return lesson.kept(
            eyes,
            (drawn(drill, f"{course.seed} words", number) for number in range(course.words * course.batch)),
            None if progress is None else lambda done: progress("looking", done, course.words * course.batch),
        )

    worded = learn(
        "words",
        [(eyes.saying(), course.rate * _WORDS_RATE)],
        course.words * course.batch * _KEPT,
        lambda numbers: lesson.words_loss(eyes, kept(), torch.tensor(numbers)),
        replace(course.recipe, batch=_WORDS_A_STEP, epochs=_WORDS_AGAIN),
    )
    kept.cache_clear()
    learned = pictured(
        "to read", drill, dict(eyes.named_parameters()), course.steps, lesson.loss, course.rate * _LAST_RATE
    )
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
        losses=(rehearsed, lettered, worded, learned),
        said=said,
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
        phrases = Phrases.of(texts.train, words[:_DRILLED], 0.8, 1.3, _CAPITALS)
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


class Kept(NamedTuple):
    """Of some patches: states as `Eyes.look_around` makes them, [n, hidden]; which patch of a picture; its token; the
    letters around, [n, WINDOW], uint8."""

    states: Tensor
    patch: Tensor
    tokens: Tensor
    windows: Tensor


class Lesson:
    """What eyes are asked. embedding: what is said for each token, [vocabulary, hidden]. empty: [patches, hidden]."""

    def __init__(self, speller: Speller, embedding: Tensor, empty: Tensor) -> None:
        self.speller = speller
        tokenizer = speller.tokenizer
        self.embedding = embedding
        self.dtype = embedding.dtype
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
        _, letters, places = eyes.computed(self.dtype, Eyes.spell, self.pixels(pictures))
        at = torch.arange(SIDE * SIDE, device=self.empty.device).repeat(len(pictures))
        rows, columns = places.flatten(0, 1).float().split(SIDE, dim=-1)
        place = F.cross_entropy(rows, at // SIDE) + F.cross_entropy(columns, at % SIDE)
        return _spelling(letters, self._asked(pictures).letters) + _PLACES * place

    @torch.no_grad()
    def kept(self, eyes: Eyes, pictures: Iterable[Picture], told: Callable[[int], None] | None = None) -> Kept:
        """Of each picture `_KEPT` patches: where tokens begin, and some others."""
        parts, done = [], 0
        while some := list(itertools.islice(pictures := iter(pictures), _SEEN_TOGETHER)):
            states = eyes.computed(self.dtype, Eyes.look_around, self.pixels(some))
            tokens, _, windows = self._asked(some)
            generator = torch.Generator().manual_seed(done)
            # the first `_KEPT` of an order at random: tokens, as many as may be, before the empty ones
            order = torch.rand(tokens.shape, generator=generator).to(tokens.device) + (tokens == EMPTY)
            first = order.argsort(1)
            spoken = (tokens != EMPTY).sum(1, keepdim=True).clamp_max(_KEPT_TOKENS)
            nth = torch.arange(_KEPT, device=tokens.device)
            empties = (tokens != EMPTY).sum(1, keepdim=True) - spoken
            patch = first.gather(1, nth + torch.where(nth >= spoken, empties, 0))
            image = torch.arange(len(some), device=tokens.device)[:, None]
            chosen = (states[image, patch], patch, tokens[image, patch], windows[image, patch].byte())
            parts.append(Kept(*(values.flatten(0, 1) for values in chosen)))
            done += len(some)
            if told is not None:
                told(done)
        return Kept(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def words_loss(self, eyes: Eyes, kept: Kept, numbers: Tensor) -> Tensor:
        """Of the tokens that kept patches say, and of the letters around."""
        states, patch, tokens, windows = (values[numbers.to(values.device)] for values in kept)
        spelled, said = eyes.computed(self.dtype, Eyes.say, states)
        return self._choice(said, patch, tokens) + _spelling(spelled, windows.long())

    def loss(self, eyes: Eyes, pictures: Sequence[Picture]) -> Tensor:
        """Of the token that each patch says, of its vector, and of all letters."""
        tokens, letters, windows = self._asked(pictures)
        seen = eyes.computed(self.dtype, Eyes.see, self.pixels(pictures))
        spoken = tokens != EMPTY
        # a few of the many empty patches, so that most of the work is about words
        share = _EMPTY_SHARE * float(spoken.sum()) / max(1, int((~spoken).sum()))
        chosen = spoken | (torch.rand(tokens.shape).to(tokens.device) < share)
        image, patch = chosen.nonzero(as_tuple=True)
        said = self._choice(seen.vectors[image, patch], patch, tokens[image, patch])
        return said + _spelling(seen.letters, letters) + _spelling(seen.windows, windows)

    def _choice(self, said: Tensor, patch: Tensor, target: Tensor) -> Tensor:
        """Loss of what patches say, [patches, hidden], where `target` is right: choice among vectors and distance."""
        others = torch.randint(len(self.vocabulary), (_OTHERS,)).to(target.device)
        candidates, places = torch.unique(
            torch.cat([target.clamp_min(0), self.vocabulary[others], self._alike(target[target != EMPTY])]),
            return_inverse=True,
        )
        scores = self._scores(said, self.empty[patch], self.embedding[candidates])
        right = torch.where(target == EMPTY, 0, places[: len(target)] + 1)
        exact = torch.where(
            (target == EMPTY)[:, None], self.empty[patch], self.embedding[target.clamp_min(0)].float()
        )
        distance = (said.float() - exact).square().sum(-1).mean() / 2
        return F.cross_entropy(scores, right) + _NEARNESS * distance

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
            tokens = self._asked(some).tokens
            vectors = eyes.computed(self.dtype, Eyes.see, self.pixels(some)).vectors
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
        """Of all pictures, with their number as the first dimension."""
        asked = [wanted(picture, self.speller) for picture in pictures]
        return Wanted(*(torch.stack(values).to(self.empty.device) for values in zip(*asked, strict=True)))

    def _scores(self, said: Tensor, empty: Tensor, known: Tensor) -> Tensor:
        """Which vector was meant: log-probabilities but for a constant, [patches, 1 + known], the empty one first.

        Of normal distributions with variance `_VARIANCE` around the vectors, one of which made what is said.
        """
        nothing = (said.float() * empty).sum(-1, keepdim=True) - empty.square().sum(-1, keepdim=True) / 2
        scores = torch.cat([nothing, (said @ known.t()).float() - known.float().square().sum(-1) / 2], dim=1)
        return scores / _VARIANCE


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spelling(named: Tensor, letters: Tensor) -> Tensor:
    """named: [..., n, 95]. letters: [..., n]. That there is none is a letter, too, and as important in a patch with
    letters as any."""
    loss = F.cross_entropy(named.flatten(0, -2).float(), letters.flatten(), reduction="none")
    weight = torch.where((letters > 0).any(-1, keepdim=True), 1.0, _BLANK_PATCH).expand(letters.shape).flatten()
    return (loss * weight).sum() / weight.sum()
