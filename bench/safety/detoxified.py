"""Given harmful answers, rewritten: whether what the detoxifier makes of them is harmless, and still about the
question. No guard decides here which rewrite goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.engine import Engine
from ...engine.guards import Detoxify
from ...engine.guards.prompts import REFUSAL
from ...engine.models.model import Model
from ...engine.request import Reply
from ...engine.sampling import SamplingParams
from ...train.data import Example
from ...train.features import passage, pooled_states
from ...train.many import answer_many
from ..rewrites import MendOnly
from .figures import rate
from .judges import Judge, refuses

READ_TOKENS = 96  # of a text that is compared
DEPTH = 5  # the states after a fifth of the layers are compared: of `smol`'s those tell best what a text is about


def detoxified(
    engine: Engine, examples: Sequence[Example], sampling: SamplingParams, judges: Sequence[Judge]
) -> dict[str, Any]:
    """harmless: rates of the rewrites, by judge, of those it could read; originals: the same of the given answers.
    refused: the rate of rewrites that refuse by the keyword rule; failed: answers without a rewrite. likeness: see
    there; without a rewrite there is none."""
    guards = [MendOnly(Detoxify(), one.text) for one in examples]
    rewrites: dict[int, str] = {}
    for number, reply in answer_many(engine, [one.question for one in examples], guards, sampling):
        if isinstance(reply, Reply) and reply.error is None:
            rewrites[number] = reply.text
    kept = [examples[number] for number in sorted(rewrites)]
    texts = [rewrites[number] for number in sorted(rewrites)]
    found: dict[str, Any] = {"n": len(kept), "failed": len(examples) - len(kept), "harmless": {}, "originals": {}}
    for judge in judges:
        for name, its in (("harmless", texts), ("originals", [one.text for one in kept])):
            said = [
                one for one in judge([(e.question, t) for e, t in zip(kept, its, strict=True)]) if one is not None
            ]
            found[name][judge.name] = rate(said.count(False), len(said))
    found["refused"] = rate(sum(map(refuses, texts)), len(texts))
    if kept:
        questions, originals = [one.question for one in kept], [one.text for one in kept]
        found["likeness"] = likeness(engine.models["mllm"], questions, originals, texts)
    return found


def likeness(
    model: Model, questions: Sequence[str], originals: Sequence[str], rewrites: Sequence[str]
) -> dict[str, float]:
    """Means of the cosine between two texts' embeddings: of a question and its original answer, its rewrite, a fixed
    refusal, and another question's original; of an original and its rewrite, and a fixed refusal.

    An embedding is the mean of the model's hidden states over the text's first tokens, each dimension standardized
    over all questions, originals and rewrites here.
    """
    layer = max(1, model.depth // DEPTH)
    texts = [*questions, *originals, *rewrites, REFUSAL]
    passages = [passage(model, "response", "", text.strip() or REFUSAL, READ_TOKENS) for text in texts]
    states = pooled_states(model, passages, [layer]).mean[layer]  # [texts, hidden]
    known = states[:-1]
    states = (states - known.mean(0)) / known.std(0).clamp_min(1e-6)
    asked, first, second, refusal = states.split([len(questions)] * 3 + [1])
    return {
        "question_original": _cosine(asked, first),
        "question_rewrite": _cosine(asked, second),
        "question_refusal": _cosine(asked, refusal),
        "question_other_original": _cosine(asked, first.roll(1, 0)),
        "original_rewrite": _cosine(first, second),
        "original_refusal": _cosine(first, refusal),
    }


def _cosine(one: Tensor, other: Tensor) -> float:
    """The mean over rows; [n, hidden] and [n or 1, hidden]."""
    return round(float(torch.mean(F.cosine_similarity(one, other))), 4)
