"""Runs inside Triton Inference Server, as `model.py` of its Python backend: texts in, verdicts out.

It needs tokenizers and NumPy beside what the server brings, and nothing of stockade. It encodes as stockade's engine
does, and asks the detector's own model for scores. It fails closed: a text that cannot be scored is harmful.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from tokenizers import Tokenizer


class TritonPythonModel:
    """The name that the server looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.detector: str = settings["detector"]
        self.threshold: float = settings["threshold"]
        self.context: int = settings["context"]
        self.vocab_size: int = settings["vocab_size"]
        self.max_batch: int = settings["max_batch"]
        self.mean: bool = settings["pooling"] == "mean"
        self.before: str | None = settings["before"]  # of the answer; {question} stands in it
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # what a text spells is text

    def execute(self, requests: list) -> list:
        """All requests that the server has gathered; a request may hold several texts."""
        asked: list[list[tuple[str, str]] | None] = []
        for request in requests:
            texts, questions = _strings(request, "text"), _strings(request, "question")
            questions = questions or [""] * len(texts)
            whole = len(texts) == len(questions)
            asked.append(list(zip(texts, questions, strict=True)) if whole else None)
        verdicts = iter(self.judge([pair for pairs in asked for pair in pairs or ()]))
        responses = []
        for pairs in asked:
            if pairs is None:
                error = pb_utils.TritonError("there must be one question a text, or none")
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=error))
                continue
            mine = [next(verdicts) for _ in pairs]
            columns = (
                ("score", np.float32, [score for score, _ in mine]),
                # NaN is not at least anything
                ("harmful", np.bool_, [not score >= self.threshold for score, _ in mine]),
                ("reason", np.object_, [reason.encode() for _, reason in mine]),
            )
            tensors = [pb_utils.Tensor(name, np.array(data, kind).reshape(-1, 1)) for name, kind, data in columns]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    def judge(self, pairs: list[tuple[str, str]]) -> list[tuple[float, str]]:
        """(text, question) -> (score, why there is none); the score is then 0."""
        found: list[tuple[float, str]] = [(0.0, "not scored")] * len(pairs)
        todo = []
        for index, (text, question) in enumerate(pairs):
            ids, pool_from = self.encode(text, question)
            if not ids:
                found[index] = (0.0, "empty")
            elif len(ids) > self.context:
                found[index] = (0.0, "too_long")
            elif max(ids) >= self.vocab_size:
                found[index] = (0.0, "unknown tokens")
            else:
                todo.append((len(ids), index, ids, pool_from))
        todo.sort()
        for start in range(0, len(todo), self.max_batch):
            batch = todo[start : start + self.max_batch]
            try:
                scores = self.scores([(ids, first) for _, _, ids, first in batch])
            except Exception as error:
                scores = [(0.0, str(error)[:200] or type(error).__name__)] * len(batch)
            for (_, index, _, _), score in zip(batch, scores, strict=True):
                found[index] = score
        return found

    def encode(self, text: str, question: str) -> tuple[list[int], int]:
        """The ids, and the first of them that holds a part of the text."""
        if self.before is None:
            return self.tokenizer.encode(text).ids, 0
        before = self.before.replace("{question}", question)
        ids, fixed = self.tokenizer.encode(before + text).ids, self.tokenizer.encode(before).ids
        common = 0
        while common < min(len(ids), len(fixed)) and ids[common] == fixed[common]:
            common += 1
        return ids, min(common, len(ids) - 1)

    def scores(self, batch: list[tuple[list[int], int]]) -> list[tuple[float, str]]:
        """One request to the detector."""
        width = max(len(ids) for ids, _ in batch)
        ids, mask, pooled = (np.zeros((len(batch), width), np.int64) for _ in range(3))
        for row, (tokens, first) in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            pooled[row, first : len(tokens)] = 1
        inputs = [pb_utils.Tensor("input_ids", ids), pb_utils.Tensor("attention_mask", mask)]
        if self.mean:
            inputs.append(pb_utils.Tensor("pool_mask", pooled))
        response = pb_utils.InferenceRequest(
            model_name=self.detector, requested_output_names=["score"], inputs=inputs
        ).exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        found = pb_utils.get_output_tensor_by_name(response, "score").as_numpy().reshape(-1)
        if len(found) != len(batch):
            raise RuntimeError("the detector gave another number of scores")
        return [(float(score), "") if np.isfinite(score) else (0.0, "nonsense") for score in found]


def _strings(request: object, name: str) -> list[str]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return []
    return [bytes(item).decode("utf-8", "replace") for item in tensor.as_numpy().reshape(-1)]
