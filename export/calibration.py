"""Moves a quantized detector's thresholds to where they flag as many texts as those of the fp32 detector do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.errors import BadInput
from ..engine.guards.prompts import detector_text
from ..engine.text import Codec
from ..train.data import Part, read_examples
from .detector_folder import Calibration, DetectorFolder
from .onnx_detector import OnnxDetector

BEGINNINGS = (16, 48, 112)  # tokens of an answer's beginnings, which calibrate the prefix threshold
_AT_ONCE = 64  # texts scored between two reports of progress

Progress = Callable[[str, int, int], None]


class CalibrationText(NamedTuple):
    """An answer and the question it answers, which only the template `question_answer` reads."""

    question: str
    answer: str


class Passage(NamedTuple):
    """A text's ids, and the first of them that is pooled."""

    ids: list[int]
    pool_from: int


def validation_texts(data: Path, limit: int) -> list[CalibrationText]:
    """The validation part of the data sets that `stockade train` reads, `limit` texts of each set and kind at most.

    Raises `DataMissing` and `DataInvalid`.
    """
    examples = read_examples(data, limit=limit)
    return [CalibrationText(item.question, item.text) for item in examples if item.part is Part.VALIDATION]


def passage(codec: Codec, template: str, question: str, answer: str, context: int) -> Passage:
    """The tokens that a detector reads, as the engine encodes them; cut to the context."""
    text = detector_text(template, question, answer)
    ids = codec.encode(text.segments, add_special_tokens=True)
    before = codec.encode(text.segments[: text.pool_from], add_special_tokens=True) if text.pool_from else []
    common = next(
        (at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
    )
    ids = ids[:context]
    return Passage(ids, min(common, len(ids) - 1))


def recalibrated(
    exact: DetectorFolder, folder: DetectorFolder, texts: Sequence[CalibrationText], progress: Progress | None
) -> DetectorFolder:
    """`folder` with the thresholds that keep the share of texts, and of their beginnings, below them.

    exact: the same detector in fp32. Raises `BadInput` where the texts have no token.
    """
    detectors = [OnnxDetector(exact), OnnxDetector(folder)]
    try:
        codec = detectors[0].codec
        whole = [passage(codec, folder.template, *text, folder.context) for text in texts if text.answer.strip()]
        if not whole:
            raise BadInput("there is no text to calibrate on")
        starts = [
            Passage(ids[: first + size], first)
            for ids, first in whole
            for size in BEGINNINGS
            if first + size < len(ids)
        ]
        before, after = (_scores(detector, whole, progress) for detector in detectors)
        threshold = matched(before, after, folder.threshold)
        prefix = folder.prefix_threshold
        if prefix is not None and starts:
            exact_starts, new_starts = (_scores(detector, starts, progress) for detector in detectors)
            prefix = matched(exact_starts, new_starts, prefix)
    finally:
        for detector in detectors:
            detector.close()
    same = float(np.mean((before < exact.threshold) == (after < threshold)))
    note = Calibration(len(whole), len(starts), exact.threshold, exact.prefix_threshold, same)
    return replace(folder, threshold=threshold, prefix_threshold=prefix, calibration=note)


def matched(before: np.ndarray, after: np.ndarray, threshold: float) -> float:
    """The threshold that as many of `after` lie below as of `before` lie below `threshold`; scores: [n] each.

    It lies in the middle between the two scores that it parts. Where all or none are below, it stays.
    """
    below = int((before < threshold).sum())
    if below in (0, len(before)):
        return threshold
    ordered = np.sort(after)
    return float((ordered[below - 1] + ordered[below]) / 2)


def _scores(detector: OnnxDetector, passages: Sequence[Passage], progress: Progress | None) -> np.ndarray:
    found: list[float] = []
    for start in range(0, len(passages), _AT_ONCE):
        some = passages[start : start + _AT_ONCE]
        found += detector.score([item.ids for item in some], [item.pool_from for item in some])
        if progress is not None:
            progress(f"scoring with {detector.folder.precision}", len(found), len(passages))
    return np.asarray(found)
