"""What images say to a frozen language model besides their words, so that it reads them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.models.vision.letters import tokens_of, told
from ..engine.text import Codec
from .eyes_model import SIDE
from .pictures import COLORS, NUMBERS, Painter, Picture, drawn, scene

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
_ANSWERED = 48  # tokens of an answer


class Exercise(NamedTuple):
    """A picture, what is asked about it, and what the answer is, or how it begins."""

    picture: Picture
    question: str
    answer: str
    whole: bool


def exercise(painter: Painter, answered: Sequence[tuple[str, str]], seed: str, number: int) -> Exercise:
    """Most ask for what stands in the picture, the others about scenes, or for an answer to a text, where there are
    any."""
    rng = random.Random(f"{seed} exercise {number}")
    if rng.random() < 0.2:
        asked = scene_question(rng)
        return Exercise(asked.picture, asked.question, asked.answer, whole=True)
    if not answered or rng.random() < 0.7:
        picture = drawn(painter, seed, number)
        return Exercise(picture, TRANSCRIBE, picture.text, whole=True)
    text, answer = rng.choice(answered)
    _, one, items = answer.partition("1. ")
    if one and rng.random() < 0.7:
        return Exercise(painter.listed(text, items=True), rng.choice(_ITEMS), one + items, whole=False)
    return Exercise(painter.listed(text, items=False), rng.choice(_QUESTIONS), answer, whole=False)


class Asked(NamedTuple):
    """A question about a scene. answers: words that are right, as `answer` says one. others: what would be wrong."""

    picture: Picture
    question: str
    answer: str
    answers: frozenset[str]
    others: frozenset[str]


def scene_question(rng: random.Random) -> Asked:
    """The color of a shape that has one color in a scene, or the number of a color's shapes."""
    while True:
        picture = scene(rng)
        words = picture.text.split()
        groups = dict(zip(zip(words[1::3], words[2::3], strict=True), map(int, words[::3]), strict=True))
        (color, shape), count = rng.choice(list(groups.items()))
        named, verb = (shape, "is") if count == 1 else (f"{shape}s", "are")
        if rng.random() < 0.5:
            number = NUMBERS[count - 1]
            right = {number, str(count)}
            others = {*NUMBERS, *map(str, range(1, len(NUMBERS) + 1))} - right
            question = f"How many {color} {shape}s are in the image?"
            return Asked(
                picture, question, f"There {verb} {number} {color} {named}.", frozenset(right), frozenset(others)
            )
        if sum(found == shape for _, found in groups) == 1:
            question = f"What color {verb} the {named} in the image?"
            answer = f"The {named} {verb} {color}."
            return Asked(picture, question, answer, frozenset({color}), frozenset(set(COLORS) - {color}))


class Blank(nn.Module):
    """What an image says where no token stands: one vector, and what each place adds to it."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.shared = nn.Parameter(start.float().clone())
        self.each = nn.Parameter(torch.zeros(SIDE * SIDE, len(start)))

    def forward(self) -> Tensor:
        """[patches, hidden], fp32."""
        return self.shared + self.each


class Reader:
    """The frozen language model as it reads pictures whose words are given to it as embeddings."""

    def __init__(self, language: Any, tokenizer: Any, token: str) -> None:
        self.language = language
        self.codec = Codec(tokenizer)
        self.embed = language.get_input_embeddings()  # which scales some models' vectors
        self.template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        self.token = token
        self.blank = self._embedded(self._ids(" "))[0]
        self.end = [tokenizer.eos_token_id]

    def loss(self, blank: Tensor, exercises: Sequence[Exercise]) -> Tensor:
        """Mean loss a token of the right answers, where pictures are read rightly. blank: as `told` has it."""
        rows, answers = [], []
        for picture, question, text, whole in exercises:
            said = told(tokens_of(picture.text, self.codec), blank.to(self.blank.dtype), self.embed)
            answer = self._ids(text) + self.end if whole else self._ids(text)[:_ANSWERED]
            before, after = self._around(question)
            parts = [self._embedded(before), said, self._embedded(after + answer)]
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
        return self._ids(before), self._ids(after)

    def _ids(self, text: str) -> list[int]:
        return self.codec.encode_text(text, add_special_tokens=False)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self.embed(torch.tensor(ids, device=self.embed.weight.device))
        return embedded
