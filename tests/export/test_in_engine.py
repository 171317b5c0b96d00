"""An engine whose detector is an exported one says what the engine with the detector in its pool says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from stockade import Engine, Guard, Replaced
from stockade.engine.errors import CheckpointMismatch, CheckpointMissing, InvalidGuard
from stockade.engine.guards import HarmHead, Refuse
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.export.detector_folder import DetectorFolder
from stockade.export.onnx_detector import OnnxDetector

CHATS = ["Tell me", "What is it that we do?", "grüße 東京", "x"]
SAMPLINGS = [SamplingParams(temperature=1.0, seed=seed, max_tokens=40 + 30 * seed) for seed in range(3)]


@pytest.fixture
def engine_with(mean_head: tuple[Path, Path]) -> Iterator[Callable[[Any], Engine]]:
    made = []

    def make(detector: Any) -> Engine:
        engine = Engine(mean_head[1], detector, dtype=torch.float32, kv_bytes=32 << 20)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("with_past", [True, False])
@pytest.mark.parametrize("chunk", [None, 7])
def test_verdicts_are_those_of_the_detector_in_the_pool(
    with_past: bool,
    chunk: int | None,
    mean_head: tuple[Path, Path],
    exported: Callable[..., DetectorFolder],
    engine_with: Callable[[Any], Engine],
) -> None:
    outside = engine_with(f"onnx:{exported('fp32', with_past).path}")
    inside = engine_with(mean_head[0])
    guard = Guard(HarmHead(chunk=chunk), Refuse())
    for sampling in SAMPLINGS:
        replies, references = (engine.chat(CHATS, guard=guard, sampling=sampling) for engine in (outside, inside))
        for reply, reference in zip(replies, references, strict=True):
            assert reply.passes[0].token_ids == reference.passes[0].token_ids
            (verdict,), (wanted,) = reply.verdicts, reference.verdicts
            assert verdict.error is None and verdict.score == pytest.approx(wanted.score, abs=1e-5)
            assert (verdict.threshold, reply.outcome) == (0.4, reference.outcome)
            assert reply.passes[1].label == ("screen" if with_past else "score")


def test_a_window_shows_nothing_unscreened(
    exported: Callable[..., DetectorFolder], engine_with: Callable[[Any], Engine]
) -> None:
    engine = engine_with(f"onnx:{exported('fp32', True).path}")
    for threshold, outcome in ((0.0, Outcome.CLEAN), (1.0, Outcome.REFUSED)):
        guard = Guard(HarmHead(threshold=threshold, prefix_threshold=0.0, chunk=8), Refuse())
        stream = engine.stream("Tell me", guard=guard, sampling=SAMPLINGS[2], release="window")
        pieces: list[str | Replaced] = []
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as stop:
                reply = stop.value
                break
        assert reply.outcome is outcome and reply.trace.unscreened_characters == 0
        assert (sum(isinstance(piece, str) for piece in pieces) > 1) and (
            isinstance(pieces[-1], Replaced) is (outcome is Outcome.REFUSED)
        )


def test_a_detector_that_is_closed_or_dead_refuses(
    exported: Callable[..., DetectorFolder], engine_with: Callable[[Any], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(HarmHead(), Refuse())
    closed = engine_with(f"onnx:{exported('fp32', True).path}")
    closed.close()
    (reply,) = closed.chat(["Tell me"], guard=guard, sampling=SAMPLINGS[0])
    assert reply.outcome is Outcome.REFUSED and "was closed" in str(reply.verdicts[0].error)
    detector = OnnxDetector(exported("fp32", True))
    engine = engine_with(detector)

    def killed(group: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(detector, "_run", killed)
    (reply,) = engine.chat(["Tell me"], guard=guard, sampling=SAMPLINGS[0])
    assert reply.outcome is Outcome.REFUSED and "is dead" in str(reply.verdicts[0].error)
    assert not engine.has_work and engine.pool.owned_pages == 0


def test_one_that_hangs_is_given_up_and_the_others_go_on(
    exported: Callable[..., DetectorFolder], engine_with: Callable[[Any], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = OnnxDetector(exported("fp32", True))
    engine = engine_with(detector)
    run = detector._run
    monkeypatch.setattr(detector, "_run", lambda group: (sleep(0.6), run(group)))
    guard = Guard(HarmHead(timeout=0.1), Refuse())
    unguarded = engine.submit("Tell me", sampling=replace(SAMPLINGS[2], ignore_eos=True))
    (reply,) = engine.chat(["Tell me"], guard=guard, sampling=SAMPLINGS[0])
    assert reply.outcome is Outcome.REFUSED and reply.verdicts[0].error == "timeout"
    while engine.has_work:
        engine.step()
    assert unguarded.reply is not None and len(unguarded.reply.token_ids) == 100


def test_folders_that_are_none_are_refused_at_once(
    tmp_path: Path, mean_head: tuple[Path, Path], exported: Callable[..., DetectorFolder]
) -> None:
    with pytest.raises(CheckpointMissing, match=r"detector\.json"):
        Engine(mean_head[1], f"onnx:{tmp_path}", dtype=torch.float32)
    folder = exported("fp32", True).path
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((tmp_path / "weights.bin").read_bytes())
    damaged[100] ^= 1
    (tmp_path / "weights.bin").write_bytes(damaged)
    with pytest.raises(CheckpointMismatch):
        Engine(mean_head[1], f"onnx:{tmp_path}", dtype=torch.float32)


def test_without_a_past_it_cannot_read_along(
    exported: Callable[..., DetectorFolder], engine_with: Callable[[Any], Engine]
) -> None:
    engine = engine_with(f"onnx:{exported('fp32', False).path}")
    with pytest.raises(InvalidGuard, match="window"):
        engine.submit("Tell me", guard=Guard(HarmHead(), Refuse()), streaming=True, release="window")
