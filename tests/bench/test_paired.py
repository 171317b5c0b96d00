"""Measurements in turn: who is whose neighbor, when enough is known, and that a moody machine moves no ratio."""

from __future__ import annotations

import json
import re
import signal
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stockade.bench.commands import app
from stockade.bench.decode import DecodeConfig, DecodePlan, Generating, Workload
from stockade.bench.document import BadDocument, read_document
from stockade.bench.paired import Contest, Enough, Round, play, shortfall, take_turns, within
from stockade.bench.workload import sources
from stockade.engine.errors import BadInput

PAIR = [("slow", "fast")]

TWO_ROUNDS = [
    "decode",
    "--model",
    "tiny-llama",
    "--new-tokens",
    "2",
    "--prefill",
    "8",
    "--batch",
    "1",
    "--rounds",
    "2",
]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read to see how fast the memory is."""
    monkeypatch.setattr("stockade.bench.decode.BUFFER_BYTES", 1 << 20)


class Worker:
    """Takes a number of steps and tells a diary."""

    def __init__(self, name: str, steps: int, diary: list[str]) -> None:
        self.name, self.left, self.diary = name, steps, diary

    @property
    def done(self) -> bool:
        return self.left == 0

    def step(self) -> None:
        self.left -= 1
        self.diary.append(self.name)


def test_turns_are_taken_in_an_order_and_its_reverse() -> None:
    diary: list[str] = []
    take_turns({name: Worker(name, steps, diary) for name, steps in (("a", 4), ("b", 4), ("c", 3))}, Random(0))
    first, second = diary[:6], diary[6:]
    assert first[:3] == first[:2:-1] and sorted(first[:3]) == ["a", "b", "c"]
    assert sorted(second) == ["a", "a", "b", "b", "c"]


class Machine:
    """Its speed changes threefold every so many pieces; `slow` takes twice what `fast` takes, more or less."""

    def __init__(self, seed: int, spread: float, moody: int = 50) -> None:
        self.random, self.spread, self.moody, self.pieces = Random(seed), spread, moody, 0

    def round(self, number: int) -> Round:
        found: dict[str, list[float]] = {"fast": [], "slow": []}
        take_turns({name: Piecework(partial(self.take, name), found[name]) for name in found}, self.random)
        return found

    def take(self, name: str) -> float:
        self.pieces += 1
        state = 1.0 if self.pieces // self.moody % 2 else 3.0
        return state * (2.0 if name == "slow" else 1.0) * (1.0 + self.spread * self.random.gauss(0.0, 1.0))


class Piecework:
    def __init__(self, take: Any, seconds: list[float]) -> None:
        self.take, self.seconds = take, seconds

    @property
    def done(self) -> bool:
        return len(self.seconds) == 8

    def step(self) -> None:
        self.seconds.append(self.take())


def played(enough: Enough, seed: int = 0, spread: float = 0.05) -> tuple[Contest, dict[str, Any]]:
    contest, done = Contest("work", PAIR, Machine(seed, spread).round), {}
    for name, do in play([contest], enough, done):
        done[name] = do()
    return contest, done


def test_rounds_go_on_until_the_ratio_is_close_and_a_repetition_says_the_same() -> None:
    found = []
    for seed in range(8):
        contest, done = played(Enough(6, 0.03, 1e9), seed)
        rounds = contest.rounds(done)
        assert len(rounds) >= 6 and within(contest.ratio(rounds, *PAIR[0])) <= 0.03
        assert len(rounds) == 6 or within(contest.ratio(rounds[:-1], *PAIR[0])) > 0.03  # and not one longer
        assert shortfall([contest], Enough(6, 0.03, 1e9), done) == ""
        found.append(contest.ratio(rounds, *PAIR[0]).median)
    assert max(found) / min(found) < 1.05 and found == pytest.approx([2.0] * 8, rel=0.03)


def test_time_ends_what_is_not_close_and_says_so() -> None:
    enough = Enough(3, 1e-6, 100.0)  # a round takes 72 at first
    contest, done = played(enough)
    assert list(done) == ["work, round 0", "work, round 1"]
    assert re.search(
        r"wanted was ± 0.0001 %, or 100 s; known are work, slow / fast to ± \d", shortfall([contest], enough, done)
    )


def test_a_contest_that_is_close_leaves_its_time_to_the_others() -> None:
    noisy = Contest("noisy", PAIR, Machine(1, 0.1).round)
    calm = Contest("calm", PAIR, Machine(1, 0.0, moody=10**9).round)
    done: dict[str, Any] = {}
    for name, do in play([noisy, calm], Enough(4, 0.03, 1e9), done):
        done[name] = do()
    assert len(calm.rounds(done)) == 4 < len(noisy.rounds(done))
    # gone on with, the same rounds are named in the same order, and none is added
    again = [name for name, _ in play([noisy, calm], Enough(4, 0.03, 1e9), dict(done))]
    assert again == list(done)


@pytest.mark.parametrize("wrong", [{"least": 0}, {"tolerance": 0.0}, {"limit": float("nan")}])
def test_what_is_never_enough_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Enough(**wrong)


def bench(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_decode_compares_the_same_work_in_short_pieces(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    common = ("decode", "--model", "tiny-llama", "--quick", "--new-tokens", "3", "--prefill", "40")
    report = bench(*common, "--json", str(file))
    assert [row["workload"] for row in report["rows"]] == ["batch 1", "batch 4", "prefill 40"]
    for row in report["rows"]:
        rates = row["tokens_per_s"]
        own, other = rates["stockade"]["median"], rates["transformers"]["median"]
        assert row["n"] == 1 and row["ratio"]["median"] == pytest.approx(own / other, rel=1e-2)
    assert report["memory"]["tokens_per_second_at_batch_1"] > 0
    assert list(read_document(file).units) == [
        "batch 1, round 0",
        "batch 4, round 0",
        "prefill 40, round 0",
        "memory",
    ]


def test_a_piece_has_so_many_tokens_and_pieces_make_one_generation() -> None:
    with sources("tiny-llama") as weights:
        plan = DecodePlan(weights, DecodeConfig((2,), 6, 10, 9, piece=4, enough=Enough(1)), torch.float32)
        work = Workload("two", 2, 6, 10, 20)
        found = plan._round(work, 0)
        assert {name: len(pieces) for name, pieces in found.items()} == {"stockade": 3, "transformers": 3}
        model = plan._speaker.model
        prompts = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
        pieces = Generating(model, prompts, work, 4)
        while not pieces.done:
            pieces.step()
        whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=10, do_sample=False)
        assert torch.equal(pieces.ids, whole)


def test_rounds_are_interrupted_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decode.json"
    common = (*TWO_ROUNDS, "--within", "1000", "--json", str(file))
    rounds = DecodePlan._round

    def interrupted(plan: DecodePlan, work: Workload, number: int) -> Round:
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        return rounds(plan, work, number)

    # a shell that runs the tests in the background ignores the signal for them
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(DecodePlan, "_round", interrupted)
            report = bench(*common, code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not report["complete"] and [row["n"] for row in report["rows"]] == [1, 1]
    first = read_document(file).units
    report = bench(*common, "--resume")
    assert report["complete"] and [row["n"] for row in report["rows"]] == [2, 2]
    kept = read_document(file).units
    assert {name: kept[name] for name in first} == first
    with pytest.raises(BadDocument, match="the setting seed"):
        bench(*common, "--resume", "--seed", "3")


def test_what_was_measured_before_a_failure_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decode.json"
    rounds = DecodePlan._round

    def failing(plan: DecodePlan, work: Workload, number: int) -> Round:
        if number == 1:
            raise BadInput("made up")
        return rounds(plan, work, number)

    monkeypatch.setattr(DecodePlan, "_round", failing)
    with pytest.raises(BadInput, match="made up"):
        bench(*TWO_ROUNDS, "--json", str(file))
    known = read_document(file, "decode")
    assert not known.complete and [row["n"] for row in known.rows] == [1, 1]
