"""How patches say tokens to a frozen language model so that it reads them almost as text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eyes_model import SIDE
from .eyes_targets import EMPTY, Speller, wanted
from .pictures import Painter, Picture, drawn

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
_ERROR = 4.0  # square of a distance; eyes are wrong by about that


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
        return self._loss(exercises, [self._said(speech, one.picture)[0] for one in exercises])

    def sensitivity(self, speech: Speech, exercises: Sequence[Exercise]) -> Tensor:
        """Which errors in what patches say the answers mind, and how much: a metric [hidden, hidden] of trace hidden.

        Second moments of the loss's gradient where words begin, at vectors that are wrong by `_ERROR`. Of `smol`'s
        576 directions 32 have three quarters of it.
        """
        hidden = self.embedding.shape[1]
        found = torch.zeros(hidden, hidden, device=self.embedding.device)
        for one in exercises:
            said, spoken = self._said(speech, one.picture)
            said = (said + torch.randn(said.shape).to(said.device) * (_ERROR / hidden) ** 0.5).detach()
            said.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self._loss([one], [said]), said)
            found += gradient[spoken].t() @ gradient[spoken]
        return found * (hidden / found.trace())

    def _said(self, speech: Speech, picture: Picture) -> tuple[Tensor, Tensor]:
        """What patches are to say, [patches, hidden], fp32, and which of them say a word, [patches]."""
        tokens = wanted(picture.lines, self.speller, picture.caption).tokens.to(self.embedding.device)
        words = speech.words(self.embedding[tokens.clamp_min(0)])
        return torch.where(tokens[:, None] == EMPTY, speech.empty(), words), tokens != EMPTY

    def _loss(self, exercises: Sequence[Exercise], pages: Sequence[Tensor]) -> Tensor:
        rows, answers = [], []
        for (_, question, text, whole), said in zip(exercises, pages, strict=True):
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
