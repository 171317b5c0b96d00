"""`bench latency` and `bench throughput`: what they count, where they find the knee, how they are interrupted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stockade.bench.asking import Asker
from stockade.bench.commands import app
from stockade.bench.document import BadDocument, Session, read_document
from stockade.bench.driving import Ask, Served, closed_loop, open_loop
from stockade.bench.latency import LatencyConfig, LatencyPlan
from stockade.bench.report import WrongPath
from stockade.bench.throughput import Load, Point, ThroughputConfig, ThroughputPlan, asked, knee, seeded
from stockade.bench.traffic import Item, Sizes
from stockade.bench.units import Unit, resumed, run_units
from stockade.bench.variants import bench_models
from stockade.bench.workload import sources
from stockade.engine.engine import Engine
from stockade.engine.errors import (
    BadInput,
    CheckpointMissing,
    DoesNotFit,
    ImagesNotSupported,
    InvalidGuard,
    PromptTooLong,
)
from stockade.engine.models.loader import ModelSet
from stockade.engine.request import Outcome

PLAIN = {"role": "user", "content": "A question."}


@pytest.fixture(scope="module")
def models() -> Iterator[ModelSet]:
    with sources("tiny-llava") as weights:
        yield bench_models(weights, torch.float32)


@pytest.fixture
def engine(models: ModelSet) -> Engine:
    return Engine(models=models, kv_bytes=64 << 20)


def ask(at: float, tokens: int, outcome: Outcome = Outcome.UNGUARDED) -> Ask:
    return Ask(Item(at, 4, 0, tokens), [PLAIN], None, outcome)


def bench(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_an_open_loop_serves_whoever_comes_when_it_is_due(engine: Engine) -> None:
    driven = open_loop(engine, [ask(0.0, 3), ask(0.0, 5), ask(0.2, 4)], 3, "verdict")
    assert [one.answer_tokens for one in sorted(driven.served)] == [3, 5, 4]
    assert driven.tokens == 12 and driven.requests == 3 and len(driven.gaps) == 12 - 3
    last = max(driven.served)
    assert last.arrival == pytest.approx(0.2) and 0.0 <= last.waited <= last.queued <= last.first_token <= last.e2e
    assert driven.seconds >= 0.2 and driven.inside < driven.seconds
    assert sum(cost.decode * cost.batches for cost in driven.costs) == driven.tokens - 3
    assert sum((c.decode + c.prefill + c.guard) * c.batches for c in driven.costs) == driven.computed
    assert engine.recorder is None and not engine.has_work
    engine.check_integrity()


def test_a_late_submission_counts_as_waiting(engine: Engine) -> None:
    """Two seconds late is two seconds longer, however fast it went then."""
    driven = open_loop(engine, [ask(-2.0, 3)], 1, "verdict")
    (one,) = driven.served
    assert one.waited >= 2.0 and one.e2e >= one.first_token >= 2.0


def test_a_closed_loop_keeps_as_many_under_way_and_ends_the_rest(engine: Engine) -> None:
    asks = (ask(0.0, 6) for _ in iter(int, 1))
    driven = closed_loop(engine, asks, 3, 7, "verdict")
    assert len(driven.served) == 7 and {one.answer_tokens for one in driven.served} == {6}
    assert driven.requests >= 7 and driven.pages == 3 and 0 < driven.pool < 1
    assert not engine.has_work
    engine.check_integrity()


def test_an_open_loop_counts_after_its_ramp_and_is_kept_up_to_the_end(engine: Engine) -> None:
    asks = (ask(0.02 * number, 4 if 3 <= number < 8 else 6) for number in count())
    driven = open_loop(engine, asks, 5, "verdict", ramp=3)
    assert [one.answer_tokens for one in driven.served] == 5 * [4]
    assert driven.requests >= 5 and driven.seconds > 0 and not engine.has_work


def test_a_request_that_ends_otherwise_is_no_result(engine: Engine) -> None:
    with pytest.raises(WrongPath, match="clean"):
        open_loop(engine, [ask(0.0, 3, Outcome.CLEAN)], 1, "verdict")


def test_guards_take_the_path_that_is_asked_of_them(engine: Engine) -> None:
    items = [Item(0.0, 6, 1, 5, harmful) for harmful in (False, True)]
    config = ThroughputConfig(("off", "protector-separate", "protector-adapter", "probe", "ecso"), trace=tuple(items))
    plan = ThroughputPlan(engine, config, "tiny", "float32")
    done: dict[str, Any] = {}
    assert run_units(plan, done)
    rows = {row["guard"]: row for row in plan.rows(done)}
    assert all(row["harmful_share"] == 0.5 and row["n"] == 2 for row in rows.values())
    computed = {name: row["computed"] for name, row in rows.items()}
    assert computed["off"] < computed["probe"] and computed["off"] < computed["protector-adapter"] < computed["ecso"]
    assert (
        rows["ecso"]["prefix_hit_percent"] > rows["off"]["prefix_hit_percent"]
    )  # the judge reads the answer's pages


def test_the_same_seed_asks_the_same_of_every_guard(engine: Engine) -> None:
    config = ThroughputConfig(("off", "probe"), Sizes(6, 0, 4, 0.5), (2,), rates=(50.0,), burst=2, requests=8)
    done: list[dict[str, Any]] = [{}, {}]
    for one in done:
        assert run_units(ThroughputPlan(engine, config, "tiny", "float32"), one)
    assert {name.rpartition(" ")[0] for name in done[0]} == {"closed 2 0", "closed 2 1", "open 50 0"}
    load = Load("open", 50.0)
    for name in ("open 50 0 off", "open 50 0 probe"):
        ramp = done[0][name]["ramp"]
        counted = list(islice(asked(config.sizes, load, 2, seeded(0, load, 0)), ramp, ramp + 8))
        served = sorted(Served(*row) for row in done[0][name]["served"])
        assert [one.arrival for one in served] == pytest.approx([item.arrival for item in counted], abs=1e-5)
        assert [one.harmful for one in served] == [item.harmful for item in counted]
    for name in ("closed 2 1 off", "closed 2 1 probe"):
        kept = [[Served(*row)[8:10] for row in run[name]["served"]] for run in done]
        assert kept[0] == kept[1]


@pytest.mark.parametrize(("seconds", "closed", "opened"), [(1e-3, 4, 12), (1e6, 12, 12)])
def test_loads_are_whole_and_rounds_fill_the_time(seconds: float, closed: int, opened: int, engine: Engine) -> None:
    """Where the time is short, one piece of each load; where it is long, as many as are wanted."""
    config = ThroughputConfig(("off", "probe"), Sizes(4, 0, 3), (1, 2), rates=(200.0,), requests=12, seconds=seconds)
    plan, done = ThroughputPlan(engine, config, "tiny", "float32"), {}
    assert plan.limit == seconds and run_units(plan, done)
    counts = {(row["loop"], row["level"], row["guard"]): row["n"] for row in plan.rows(done)}
    assert {n for (loop, *_), n in counts.items() if loop == "closed"} == {closed}
    assert {n for (loop, *_), n in counts.items() if loop == "open"} == {opened}
    assert len(counts) == 6 and all(found["took"] > 0 for found in done.values())
    rounds = [int(name.split()[2]) for name in done]
    assert rounds == sorted(rounds) and max(rounds) == (0 if seconds < 1 else 2)
    traced = ThroughputPlan(engine, replace(config, trace=(Item(0.0, 4, 0, 3),)), "tiny", "float32")
    assert traced.limit is None  # it takes as long as it says


def test_a_sweep_goes_on_until_the_knee_is_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The throughput of a machine that serves six at once, each in a second: the knee is near six."""
    plan = ThroughputPlan(engine, ThroughputConfig(("off",), rates=None, seconds=40.0), "tiny", "float32")

    def row(name: str) -> dict[str, Any]:
        level = float(name.split()[1])
        rate = min(level, 6.0) * (1 - 0.01 * level)
        return {
            "guard": "off",
            "loop": "closed",
            "level": level,
            "requests_per_s": rate,
            "e2e_ms": {"p50": 1e3 * level / rate},
        }

    monkeypatch.setattr(plan, "rows", lambda done: [row(name) for name in done])
    done: dict[str, Any] = {}
    for name, _ in plan.units(done):
        done[name] = {"costs": [], "took": 1.0}
    # eight is best of the doubled ones, seen when both 16 and 32 were worse; then what lies around it
    ladder = [1, 2, 4, 8, 16, 32, 5, 11]
    levels = [int(name.split()[1]) for name in done]
    assert levels[:8] == ladder
    # then rounds of all of them, each in an order of its own, until the time is over
    assert len(levels) == 40 and all(sorted(levels[at : at + 8]) == sorted(ladder) for at in range(0, 40, 8))
    assert levels[8:16] != levels[16:24]
    assert plan.more(done)["knees"]["off"]["level"] == 5
    # and the same again when it is gone on with
    again = islice(plan.units(dict(list(done.items())[:20])), 20)
    assert [name for name, _ in again] == list(done)[:20]


def test_the_knee_has_the_greatest_power() -> None:
    points = [Point(1, 1.0, 1.0), Point(2, 1.9, 1.05), Point(4, 3.0, 1.33), Point(8, 3.2, 2.5)]
    assert knee(points).level == 4
    assert knee([Point(1, 1.0, 1.0), Point(2, 2.0, 2.0)]).level == 1  # equal power: the smaller load


def test_a_shared_text_is_found_again(engine: Engine) -> None:
    config = ThroughputConfig(("off",), Sizes(6, 0, 4), (1,), rates=None, requests=4)
    hits = {}
    for shared in (0, 150):
        plan, done = ThroughputPlan(engine, replace(config, shared_tokens=shared), "tiny", "float32"), {}
        assert run_units(plan, done)
        hits[shared] = plan.rows(done)[0]["prefix_hit_percent"]
    assert hits[150] > 70.0 > hits[0]


class Counting:
    """A plan of three pieces, of which the second may be interrupted."""

    kind, seed, settings = "latency", 0, {"sizes": (1, 2)}

    def __init__(self, stop: Any = None) -> None:
        self.stop, self.did = stop, []

    def warm_up(self) -> None:
        self.did.append("warm-up")

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        for name in ("a", "b", "c"):
            yield name, lambda name=name: self._do(name)

    def _do(self, name: str) -> str:
        if name == "b" and self.stop is not None:
            self.stop()
        self.did.append(name)
        return name.upper()

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"name": name} for name in done]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)])
def test_an_interrupted_measurement_keeps_what_it_has_and_goes_on(stop: Any, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    plan, done = Counting(stop), {}
    assert not run_units(plan, done)
    assert done == {"a": "A"} and signal.getsignal(signal.SIGTERM) is handler
    file = tmp_path / "run.json"
    session = Session.begin()
    session.document("latency", plan.settings, plan.rows(done), seed=0, complete=False, units=done).write(file)
    earlier = read_document(file, "latency")
    assert not earlier.complete and earlier.rows == [{"name": "a"}]
    plan = Counting()
    done = resumed(plan, earlier)
    assert run_units(plan, done)
    assert plan.did == ["warm-up", "b", "c"] and list(done.values()) == ["A", "B", "C"]


def test_another_measurement_is_not_gone_on_with() -> None:
    plan = Counting()
    earlier = Session.begin().document("latency", {"sizes": [1, 3]}, [])
    with pytest.raises(BadDocument, match="the setting sizes"):
        resumed(plan, earlier)
    earlier = replace(earlier, settings={"sizes": [1, 2]})
    assert resumed(plan, earlier) == {}
    for other in ({"commit": "another"}, {"machine": {}}, {"versions": {}}):
        with pytest.raises(BadDocument, match=next(iter(other))):
            resumed(plan, replace(earlier, **other))


def test_latency_has_a_row_for_every_combination_that_can_be(engine: Engine) -> None:
    config = LatencyConfig(
        (4, 8), (0, 1), (3,), ("off", "probe", "ecso"), ("verdict", "window", "audit"), harmful=True, repeats=1
    )
    plan = LatencyPlan(engine, config, "tiny", "float32")
    done: dict[str, Any] = {}
    assert run_units(plan, done)
    rows = plan.rows(done)
    assert {(row["prompt_tokens"], row["images"]) for row in rows} == {(4, 0), (4, 1), (8, 0), (8, 1)}
    found = [
        (row["guard"], row["release"], row["path"]) for row in rows if (row["prompt_tokens"], row["images"]) == (4, 0)
    ]
    assert found == [
        ("off", "live", "harmless"),
        *((("probe", "verdict", path)) for path in ("harmless", "harmful")),
        *((("probe", "window", path)) for path in ("harmless", "harmful")),
        ("probe", "audit", "harmless"),
        *((("ecso", "verdict", path)) for path in ("harmless", "harmful")),
        ("ecso", "audit", "harmless"),
    ]
    for row in rows:
        assert row["first_token_ms"]["p50"] <= row["ttft_ms"]["p50"] <= row["e2e_ms"]["p50"]
        assert row["itl_ms"]["n"] == 2
    assert plan.table(done).row_count == len(rows)


def test_what_cannot_be_measured_is_refused(engine: Engine) -> None:
    for wrong in ({"rates": (1.0, -1.0)}, {"rates": (float("nan"),)}, {"speed": 0.0}, {"seconds": float("inf")}):
        with pytest.raises(BadInput, match="above 0 and finite"):
            ThroughputPlan(engine, ThroughputConfig(**wrong), "tiny", "float32")
    for config in (LatencyConfig(guards=("nothing",)), LatencyConfig(releases=("never",))):
        with pytest.raises(BadInput, match=r"no (guard|release)"):
            LatencyPlan(engine, config, "tiny", "float32")
    with pytest.raises(BadInput, match="verdict"):
        LatencyPlan(engine, LatencyConfig(guards=("ecso",), releases=("window",)), "tiny", "float32")
    with pytest.raises(DoesNotFit, match="for the answer"):
        LatencyPlan(engine, LatencyConfig(answer_tokens=(2000,)), "tiny", "float32")
    with pytest.raises(PromptTooLong, match="room to answer"):
        ThroughputPlan(engine, ThroughputConfig(sizes=Sizes(prompt_tokens=5000)), "tiny", "float32")
    with pytest.raises(InvalidGuard, match="window"):
        run_units(ThroughputPlan(engine, ThroughputConfig(("ecso",), release="window"), "tiny", "float32"), {})
    with sources("tiny-llama") as weights:
        blind = Engine(models=bench_models(weights, torch.float32), kv_bytes=64 << 20)
    with pytest.raises(ImagesNotSupported, match="eyes"):
        Asker(blind).check_fits([Item(0.0, 4, 1, 4)])


def test_latency_is_measured_interrupted_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(tmp_path / "latency.json")
    common = ("latency", "--profile", "ci", "--guard", "off", "--guard", "probe", "--json", file)
    rounds = LatencyPlan._round

    def interrupted(plan: LatencyPlan, number: int) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return rounds(plan, number)

    with monkeypatch.context() as patched:
        patched.setattr(LatencyPlan, "_round", interrupted)
        report = bench(*common, code=130)
    assert not report["complete"] and {row["n"] for row in report["rows"]} == {1}
    report = bench(*common, "--resume")
    assert report["complete"] and {row["n"] for row in report["rows"]} == {2}
    assert report["kind"] == "latency" and report["settings"]["model"] == "tiny-llava" and not report["units"]
    assert list(read_document(Path(file)).units) == ["round 0", "round 1"]
    with pytest.raises(BadDocument, match="repeats"):
        bench(*common, "--resume", "--repeats", "3")
    with pytest.raises(BadInput, match="--json"):
        bench("latency", "--resume")
    with pytest.raises(BadInput, match="no document can be written"):  # said before hours of work
        bench("latency", "--json", str(tmp_path / "nowhere" / "x.json"))
    with pytest.raises(CheckpointMissing, match="no named shape"):
        bench("latency", "--model", str(tmp_path / "nowhere"))


def test_throughput_sweeps_holds_an_objective_and_reads_traces(tmp_path: Path) -> None:
    common = ("throughput", "--profile", "ci", "--guard", "off", "--guard", "protector-adapter")
    report = bench(*common, "--objective", "e2e=1000s", "--harmful", "0.5")
    closed = [row for row in report["rows"] if row["guard"] == "off" and row["loop"] == "closed"]
    assert [row["level"] for row in closed] == [1, 2, 4]
    rates = [row["level"] for row in report["rows"] if row["guard"] == "off" and row["loop"] == "open"]
    best = max(row["requests_per_s"] for row in closed)
    assert rates == pytest.approx([part * best for part in (0.4, 0.6, 0.8)], rel=0.01)
    able = {row["level"] for row in report["rows"] if row["guard"] == "protector-adapter" and row["loop"] == "open"}
    # a guard too slow for any of the rates was not asked, and holds none
    assert report["held"] == {"off": max(rates), **({"protector-adapter": max(able)} if able else {})}
    assert all(row["goodput_per_s"] == row["requests_per_s"] for row in report["rows"])
    assert set(report["knees"]) == set(report["step_costs"]) == {"off", "protector-adapter"}
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt_tokens,images,answer_tokens\n5,4,0,4\n5.5,4,1,3\n")
    report = bench(*common, "--trace", str(trace), "--speed", "10")
    assert [(row["loop"], row["level"], row["n"]) for row in report["rows"]] == 2 * [("trace", 20.0, 2)]
