"""Readings on the detector's thread: growing and changing texts, many at once, and everything that may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from threading import Event
from time import sleep

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockade.engine.errors import BadInput, DetectorClosed, PassError, TooLong
from stockade.export.detector_folder import DetectorFolder
from stockade.export.onnx_detector import OnnxDetector, Reading
from tests.conftest import VOCAB
from tests.export.test_parity import waited


def text(length: int, random: Random) -> list[int]:
    return [random.randrange(3, VOCAB - 4) for _ in range(length)]


def common(left: list[int], right: list[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), with_past=st.booleans())
def test_texts_that_grow_and_change_end_with_the_score_of_one_pass(
    seed: int, with_past: bool, exported: Callable[..., DetectorFolder]
) -> None:
    random = Random(seed)
    detector = OnnxDetector(exported("fp32", with_past), threads=1, max_batch=3)
    texts: list[list[int]] = [[] for _ in range(4)]
    readings = [detector.open() for _ in texts]
    pool_from = [0] * len(texts)
    for _ in range(5):
        for index, reading in enumerate(readings):
            old = texts[index]
            kept = random.randint(max(0, len(old) - 6), len(old))
            texts[index] = old[:kept] + text(random.randint(1, 60), random)
            pool_from[index] = random.choice([pool_from[index], random.randrange(4)])
            reading.feed(common(old, texts[index]), texts[index], pool_from[index])
        if random.random() < 0.3:
            sleep(0.01)
    found = [waited(reading) for reading in readings]
    assert found == pytest.approx(detector.score(texts, pool_from), abs=1e-5)
    detector.close()


def test_a_text_longer_than_its_first_room_and_than_a_chunk(exported: Callable[..., DetectorFolder]) -> None:
    detector = OnnxDetector(exported("fp32", True), threads=1)
    ids = text(512, Random(1))
    reading = detector.open()
    for end in (200, 300, 512):
        reading.feed(min(end, 200), ids[:end], 3)
        waited(reading)
    assert reading.poll() == pytest.approx(detector.score([ids], [3])[0], abs=1e-5)
    detector.close()


def test_what_is_done_is_told_and_the_same_text_is_not_run_again(exported: Callable[..., DetectorFolder]) -> None:
    detector = OnnxDetector(exported("fp32", True), threads=1)
    reading, told = detector.open(), Event()
    assert reading.poll() is None
    reading.on_done = told.set
    reading.feed(0, [5, 6, 7, 8], 0)
    assert told.wait(10)
    score = reading.poll()
    assert score is not None
    reading.feed(4, [5, 6, 7, 8], 0)
    assert reading.poll() == score
    reading.feed(2, [5, 6], 0)  # shorter: nothing was scored of it
    assert waited(reading) == pytest.approx(detector.score([[5, 6]], [0])[0], abs=1e-5)
    detector.close()


def test_texts_that_wait_run_as_one_batch(
    exported: Callable[..., DetectorFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = OnnxDetector(exported(), threads=1, max_batch=4)
    hold, sizes, run = Event(), [], detector._session.run

    def slow(rows, caches=None):  # type: ignore[no-untyped-def]
        sizes.append(len(rows))
        hold.wait(10)
        return run(rows, caches)

    monkeypatch.setattr(detector._session, "run", slow)
    readings = [detector.open() for _ in range(6)]
    readings[0].feed(0, [4, 5], 0)
    while not sizes:
        sleep(0.001)
    for reading in readings[1:]:
        reading.feed(0, [4, 5, 6], 0)
    hold.set()
    scores = [waited(reading) for reading in readings]
    assert sizes == [1, 4, 1]
    assert scores[1:] == pytest.approx([scores[1]] * 5)
    detector.close()


def test_a_reading_that_is_canceled_gives_no_score(exported: Callable[..., DetectorFolder]) -> None:
    detector = OnnxDetector(exported("fp32", True), threads=1)
    reading, other = detector.open(), detector.open()
    reading.feed(0, [5] * 300, 0)
    reading.cancel()
    with pytest.raises(PassError, match="canceled"):
        reading.poll()
    with pytest.raises(PassError):
        reading.feed(0, [5, 6], 0)
    other.feed(0, [5, 6], 0)
    assert 0 <= waited(other) <= 1
    detector.close()


@pytest.mark.parametrize(
    ("ids", "pool_from", "error", "says"),
    [
        ([], 0, BadInput, "at least one token"),
        ([5] * 513, 0, TooLong, "takes 512"),
        ([VOCAB], 0, BadInput, "from 0 to 383"),
        ([-1], 0, BadInput, "from 0 to 383"),
        ([5], -1, BadInput, "pool_from"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_queued(
    ids: list[int], pool_from: int, error: type[Exception], says: str, exported: Callable[..., DetectorFolder]
) -> None:
    detector = OnnxDetector(exported("fp32", True), threads=1)
    reading = detector.open()
    with pytest.raises(error, match=says):
        reading.feed(0, ids, pool_from)
    with pytest.raises(error, match=says):
        detector.score([ids], [pool_from])
    reading.feed(0, [5, 6], 0)
    assert 0 <= waited(reading) <= 1
    detector.close()


def test_a_failed_batch_is_an_error_of_its_texts_only(
    exported: Callable[..., DetectorFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = OnnxDetector(exported(), threads=1)
    run = detector._session.run
    monkeypatch.setattr(detector._session, "run", lambda rows, caches: 1 / 0)
    reading = detector.open()
    reading.feed(0, [5, 6], 0)
    with pytest.raises(PassError, match="division"):
        waited(reading)
    monkeypatch.setattr(detector._session, "run", run)
    other = detector.open()
    other.feed(0, [5, 6], 0)
    assert 0 <= waited(other) <= 1
    detector.close()


def test_a_killed_thread_is_an_error_and_a_hanging_one_gives_no_score(
    exported: Callable[..., DetectorFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, hold = OnnxDetector(exported(), threads=1), Event()
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)  # pytest's own would complain later

    def hang(rows, caches):  # type: ignore[no-untyped-def]
        hold.wait(10)
        raise SystemExit

    monkeypatch.setattr(detector._session, "run", hang)
    reading = detector.open()
    reading.feed(0, [5, 6], 0)
    sleep(0.05)
    assert reading.poll() is None
    hold.set()
    detector._thread.join(10)
    for ask in (reading.poll, lambda: reading.feed(2, [5, 6, 7], 0), detector.open):
        with pytest.raises(PassError, match="dead"):
            ask()
    with pytest.raises(PassError, match="dead"):
        detector.score([[5]], [0])


def test_after_close_everything_is_refused(exported: Callable[..., DetectorFolder]) -> None:
    detector = OnnxDetector(exported("fp32", True), threads=1)
    reading: Reading = detector.open()
    detector.close()
    detector.close()
    assert not detector._thread.is_alive()
    for ask in (lambda: reading.feed(0, [5], 0), reading.poll, detector.open, lambda: detector.score([[5]], [0])):
        with pytest.raises(DetectorClosed):
            ask()


def test_providers_and_numbers_that_cannot_be_are_refused(exported: Callable[..., DetectorFolder]) -> None:
    folder = exported()
    with pytest.raises(BadInput, match="CPUExecutionProvider"):
        OnnxDetector(folder, providers=["WarpDriveExecutionProvider"])
    with pytest.raises(BadInput, match="not none"):
        OnnxDetector(folder, providers=[])
    with pytest.raises(BadInput, match="threads"):
        OnnxDetector(folder, threads=0)
    with pytest.raises(BadInput, match="max_batch"):
        OnnxDetector(folder, max_batch=True)
