"""A detector that other processes run: the same verdicts as one in the engine, and a refusal wherever it fails."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stockade import Engine, Guard
from stockade.engine.errors import Aborted, BadInput, DetectorClosed, ReplicaLost, TooLong
from stockade.engine.guards import HarmHead, Refuse
from stockade.engine.outside import OutsideDetector
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.serving import remote_detector
from stockade.engine.serving.remote_detector import RemoteDetector, Scorer
from stockade.export.detector_folder import DetectorFolder
from stockade.export.onnx_detector import OnnxDetector

CHATS = ["Tell me", "What is it that we do?", "grüße 東京", "x"]
SAMPLING = SamplingParams(temperature=1.0, seed=1, max_tokens=40)


@pytest.fixture
def scorers(exported: Callable[..., DetectorFolder]) -> Iterator[list[Scorer]]:
    made = [Scorer(OnnxDetector(exported("fp32", True))) for _ in range(2)]
    yield made
    for scorer in made:
        scorer.detector.close()


@pytest.fixture
def engine_with(
    mean_head: tuple[Path, Path], exported: Callable[..., DetectorFolder]
) -> Iterator[Callable[..., Engine]]:
    made = []

    def make(ask: Any, **options: Any) -> Engine:
        detector = RemoteDetector(exported("fp32", True), ask, **options)
        assert isinstance(detector, OutsideDetector)
        made.append(Engine(mean_head[1], detector, dtype=torch.float32, kv_bytes=32 << 20))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        engine.close()


@pytest.mark.parametrize("chunk", [None, 7])
def test_verdicts_are_those_of_the_detector_in_the_pool(
    chunk: int | None, mean_head: tuple[Path, Path], scorers: list[Scorer], engine_with: Callable[..., Engine]
) -> None:
    calls: list[int] = []

    async def ask(name: str, ids: list[int], pool_from: int) -> float:
        """Every third call is lost; every call goes to the other process than the one before."""
        calls.append(len(ids))
        if len(calls) % 3 == 0:
            raise ReplicaLost("it has died")
        return await scorers[len(calls) % 2].score(name, ids, pool_from)

    guard = Guard(HarmHead(chunk=chunk), Refuse())
    replies = engine_with(ask).chat(CHATS, guard=guard, sampling=SAMPLING)
    inside = Engine(mean_head[1], mean_head[0], dtype=torch.float32, kv_bytes=32 << 20)
    for reply, wanted in zip(replies, inside.chat(CHATS, guard=guard, sampling=SAMPLING), strict=True):
        assert reply.verdicts[0].error is None and reply.outcome == wanted.outcome
        assert reply.verdicts[0].score == pytest.approx(wanted.verdicts[0].score, abs=1e-5)
    assert len(calls) > len(CHATS)


def _lost(*_: Any) -> Any:
    raise ReplicaLost("it has died")


def _failed(*_: Any) -> Any:
    raise RuntimeError("what it says may hold a text")


async def _nonsense(*_: Any) -> float:
    return math.nan


async def _hangs(*_: Any) -> float:
    await asyncio.sleep(60)
    return 1.0


@pytest.mark.parametrize(
    ("ask", "reason"), [(_lost, "ReplicaLost"), (_failed, "RuntimeError"), (_nonsense, ""), (_hangs, "timeout")]
)
def test_whatever_gives_no_score_refuses(ask: Any, reason: str, engine_with: Callable[..., Engine]) -> None:
    engine = engine_with(ask, seconds=0.3)
    (reply,) = engine.chat(CHATS[:1], guard=Guard(HarmHead(), Refuse()), sampling=SAMPLING)
    assert reply.outcome is Outcome.REFUSED and reply.verdicts[0].harmful
    assert reason in f"{reply.verdicts[0].error} {reply.verdicts[0].detail}"
    assert "hold a text" not in str(reply.verdicts)


def test_a_text_that_grows_costs_its_new_tokens_and_the_oldest_are_forgotten(
    scorers: list[Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_detector, "READINGS", 2)
    scorer, fresh = scorers
    fed: list[int] = []
    whole = [5, 6, 7, 8, 9, 10]

    async def ask() -> None:
        for name, ids in (("a", whole[:3]), ("a", whole), ("b", [9, 9]), ("c", [4, 4]), ("a", [5, 6, 1])):
            score = await scorer.score(name, ids, 0)
            assert score == pytest.approx(await fresh.score(f"other {len(fed)}", ids, 0), abs=1e-6)
            fed.append(len(scorer._readings))
        with pytest.raises(TooLong):
            await scorer.score("b", [5] * 100_000, 0)
        assert list(scorer._readings) == ["c", "a"] and scorer._readings["a"][1] == [5, 6, 1]

    asyncio.run(ask())
    assert fed == [1, 1, 2, 2, 2]


def test_what_it_cannot_read_and_what_is_closed_is_refused(exported: Callable[..., DetectorFolder]) -> None:
    detector = RemoteDetector(exported("fp32", True), _hangs)
    reading = detector.open()
    with pytest.raises(TooLong):
        reading.feed(0, [1] * (detector.context + 1), 0)
    with pytest.raises(BadInput):
        reading.feed(0, [], 0)
    reading.feed(0, [1], 0)
    assert reading.poll() is None
    detector.close()
    with pytest.raises(DetectorClosed):
        reading.poll()
    with pytest.raises(DetectorClosed):
        detector.open()
    reading.cancel()
    with pytest.raises(Aborted):
        reading.poll()
