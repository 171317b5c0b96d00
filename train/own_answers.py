"""The base's own answers to questions that look alarming and are not, XSTest's and more: harmless and helpful."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from ..engine.errors import InvalidMessage
from ..engine.guards import Guard, HarmHead
from ..engine.models.loader import load_models
from .answered import answered
from .contrast import contrast_questions
from .data import SETS, Example, Source, read_questions
from .loop import Progress
from .rows import Bad, json_rows, refuse


def own_answers(
    base: str | Path,
    data: Path,
    kept: Path,
    *,
    seed: int,
    limit: int | None,
    bad: Bad = refuse,
    progress: Progress | None = None,
) -> list[Example]:
    """None where XSTest is not under `data`, or where the base has no chat template to ask with.

    XSTest's questions are answered whatever comes of it, some of them measure. Of a base that brings a detector there
    are this project's own questions too, as far as the detector finds their answers harmless; they only train.
    kept: a file that keeps the answers, so that an interrupted run goes on with the same ones.
    Raises `DataInvalid`, or a `CheckpointError`.
    """
    if not (data / SETS[Source.XSTEST].folder).is_dir():
        return []
    questions = read_questions(data, seed=seed, limit=limit, bad=bad)
    measure = [item.question for item in read_questions(data, seed=seed, bad=bad)]
    more = contrast_questions(measure)[:limit]
    known = {row["question"]: row["text"] for _, row in json_rows(kept)} if kept.is_file() else {}
    if not known.keys() >= {item.question for item in (*questions, *more)}:
        models = load_models(base)
        try:
            examples = answered(models, questions, progress)
        except InvalidMessage:
            return []
        if "detector" in models.models:
            examples += answered(models, more, progress, Guard(HarmHead(), max_rounds=0))
        known = {item.question: None for item in more} | {item.question: item.text for item in examples}
        part = kept.with_name(f".{kept.name}.part")
        lines = (json.dumps({"question": question, "text": text}) for question, text in known.items())
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(part, kept)
    return [replace(item, text=known[item.question]) for item in (*questions, *more) if known[item.question]]
