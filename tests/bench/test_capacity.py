"""The simulated replica against queueing theory, against rooflines, and against the real engine on its own clock."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from stockade.bench.capacity import (
    CannotHold,
    Plan,
    Traffic,
    find,
    placement_named,
    run_capacity,
)
from stockade.bench.capacity_check import compare, read_run
from stockade.bench.capacity_report import CapacityReport
from stockade.bench.commands import app
from stockade.bench.cost_fit import (
    FittedCosts,
    LaneFit,
    LaneNotMeasured,
    StepLoad,
    fit,
    measured_steps,
    outside_costs,
)
from stockade.bench.document import BadDocument, Document, Session
from stockade.bench.guard_programs import GUARDS, Asked, Sizes, Stage, models_of, stages
from stockade.bench.objective import Objective
from stockade.bench.replica import Job, Limits, Placement, Replica, simulate
from stockade.bench.roofline import h200
from stockade.bench.roofline_costs import gpu_limits, roofline_costs
from stockade.bench.roofline_report import setup_of
from stockade.bench.step_costs import StepCost, pooled, step_costs
from stockade.bench.traffic import Item
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, DoesNotFit
from stockade.engine.guards import Detoxify, EyesClosed, Guard, HarmHead, SelfJudge
from stockade.engine.request import Reply
from stockade.engine.sampling import SamplingParams
from stockade.engine.trace import Recorder

ONE_LANE = "mllm+detector+detoxifier"


def costs(base: float = 0.010, decode: float = 0.0005, prefill: float = 0.0002) -> FittedCosts:
    own = LaneFit(base, decode, prefill, prefill, 0.0, 100, 0.0)
    return FittedCosts({"mllm": own, "detector": own, "detoxifier": own}, "made up")


def plan(rate: float = 5.0, **traffic: object) -> Plan:
    known: dict[str, object] = {"prompt": 32, "answer": 24, "harmful": 0.2} | traffic
    return Plan(costs(), Limits(), Sizes(), Traffic(rate, **known), Objective(e2e=1.0), requests=150)


# Costs.


def test_prices_are_found_again_although_some_steps_were_disturbed():
    random = np.random.default_rng(0)
    steps = []
    for _ in range(200):
        decode, prefill, guard = (int(value) for value in random.integers(0, 60, 3))
        seconds = 0.012 + 0.0006 * decode + 0.0003 * prefill + 0.0004 * guard
        late = 5.0 if random.random() < 0.08 else 1.0
        steps.append(StepCost("mllm", decode, prefill, guard, False, 3, seconds * late, 0.0))
    found = fit(steps, "here").lanes["mllm"]
    assert found[:4] == pytest.approx((0.012, 0.0006, 0.0003, 0.0004), rel=0.02)
    assert found.error < 0.01


def test_tiles_that_are_half_empty_cost_what_full_ones_do():
    steps = []
    for rows in (1, 2, 5, 11, 15, 16, 17, 22, 32, 33, 64):
        for prefill in (0, 64):
            seconds = 0.012 + 0.0002 * rows + 0.005 * -(-(rows + prefill) // 16)
            steps.append(StepCost("mllm", rows, prefill, 0, False, 3, seconds, 0.0))
    found = fit(steps, "here").lanes["mllm"]
    assert (found.base, found.decode, found.tile) == pytest.approx((0.012, 0.0002, 0.005), rel=0.01)
    assert found.seconds(StepLoad(decode=17)) - found.seconds(StepLoad(decode=16)) == pytest.approx(0.0052, rel=0.01)
    assert found.slower(2.0).seconds(StepLoad(decode=17)) == pytest.approx(2 * found.seconds(StepLoad(decode=17)))


def test_rows_that_were_never_seen_cost_what_similar_rows_do_and_are_named():
    steps = [
        StepCost("mllm", d, p, 0, False, 1, 0.01 + 0.001 * d + 0.0002 * p, 0.0) for d in range(4) for p in (0, 64)
    ]
    found = fit(steps, "here").lanes["mllm"]
    assert found.guard == found.prefill > 0
    assert found.unseen == ("guard",)


def test_the_tower_has_a_price_of_its_own():
    steps = [
        StepCost("mllm", d, 0, 0, bool(d % 2), 1, 0.01 * d + (0.2 if d % 2 else 0.0), 0.2 * (d % 2))
        for d in range(1, 9)
    ]
    found = fit(steps, "here").lanes["mllm"]
    assert found.image == 0.2
    assert found.seconds(StepLoad(decode=3, images=2)) == pytest.approx(0.43, rel=0.01)


def test_a_lane_without_steps_is_refused_by_name():
    some = costs()
    with pytest.raises(LaneNotMeasured, match="probe"):
        some.lane("probe")
    with pytest.raises(LaneNotMeasured, match="fewer than"):
        fit([StepCost("mllm", 1, 0, 0, False, 9, 0.01, 0.0)], "here")


def test_rooflines_are_those_of_the_notes():
    """Llama-2-7B in bf16 on an H200 at a context of 1,024: 3.20 ms alone, 11.06 ms for 64."""
    paper = roofline_costs(setup_of("llava-1.5-7b", "open-llama-3b"), h200())
    for batch, milliseconds in ((1, 3.20), (64, 11.06)):
        seconds = paper.demand("mllm", StepLoad(decode=batch, read=1024 * batch)).seconds
        assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.01)
    detector = paper.demand("detector", StepLoad(guard=256, pairs=256 * 128))
    assert 1e3 * detector.seconds == pytest.approx(2.10, rel=0.02)  # bound by computing
    assert "not measured" in paper.source
    with pytest.raises(LaneNotMeasured):
        paper.lane("probe")


# The step loop.


def alone(guard: str, harmful: bool = False, placement: Placement | None = None) -> Job:
    asked = Asked(0.0, 32, 24, 0, harmful)
    replica = Replica(costs(), models_of(guard, harmful), Limits(), placement or Placement())
    return simulate([replica], [Job(0, asked, stages(guard, asked, Sizes()))])[0]


def test_a_request_alone_takes_its_steps_and_nothing_else():
    job = alone("off")
    assert job.first == pytest.approx(0.010 + 62 * 0.0002)
    assert job.finished == pytest.approx(job.first + 23 * 0.0105)
    # a probe's closing row, an adapter's few rows, a judge's prompt, a whole answer for a detector of its own
    added = {guard: alone(guard).finished - job.finished for guard in GUARDS[1:]}
    assert added["probe"] == pytest.approx(0.010 + 0.0002)
    assert added["protector-adapter"] == pytest.approx(0.010 + 5 * 0.0002)
    assert added["protector-separate"] == pytest.approx(0.010 + 24 * 0.0002)
    assert added["ecso"] == pytest.approx(0.010 + (35 + 32 + 24) * 0.0002)
    assert all(alone(guard, True).finished > 1.8 * job.finished for guard in GUARDS[1:])


def test_a_detector_on_processor_cores_takes_the_time_that_it_takes_there():
    there = Placement("cpu", outside=(0.05, 0.001), workers=1)
    job = alone("protector-separate", placement=there)
    assert job.finished == pytest.approx(alone("off").finished + 0.05 + 24 * 0.001)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(GUARDS),
    st.sampled_from([Placement(), Placement("stream", True), Placement("own", False, True)]),
    st.floats(0.5, 30.0),
    st.sampled_from([None, 400]),
    st.integers(0, 1000),
)
@example("protector-separate", Placement("stream", True), 24.0, 400, 560)  # preempted while its batch ran
def test_every_arrival_leaves_and_littles_law_holds(
    guard: str, placement: Placement, rate: float, kv: int | None, seed: int
):
    traffic = Traffic(rate, prompt=24, answer=12, harmful=0.3)
    limits = Limits(budget=64, max_sequences=8, kv_tokens=kv)
    replicas = [Replica(costs(), models_of(guard, True), limits, placement) for _ in range(2)]
    jobs = [Job(n, one, stages(guard, one, Sizes())) for n, one in enumerate(traffic.asked(1.0, 40, seed))]
    done = simulate(replicas, jobs)
    assert len(done) == 40
    assert all(job.finished is not None and job.finished > job.asked.arrival for job in done)
    assert sorted(job.number for replica in replicas for job in replica.finished) == list(range(40))
    for replica in replicas:
        assert replica.under_way == replica.kv == 0
        assert all(not lane.held and not lane.read for device in replica.devices for lane in device.lanes)
        assert all(device.busy <= replica.now + 1e-6 for device in replica.devices)
    # Little: what the replicas counted over time is what the requests stayed, one by one
    stays = [job.finished - job.asked.arrival for job in done]
    assert sum(replica.waited for replica in replicas) == pytest.approx(sum(stays))


def test_pages_bound_what_runs_at_once_and_a_request_that_never_fits_is_refused():
    few = Limits(kv_tokens=300)
    asked = [Asked(0.0, 32, 64) for _ in range(6)]
    jobs = [Job(n, one, stages("off", one, Sizes())) for n, one in enumerate(asked)]
    replica = Replica(costs(), {"mllm"}, few, Placement())
    simulate([replica], jobs)
    assert all(job.finished is not None for job in jobs)
    assert replica.preemptions > 0
    with pytest.raises(DoesNotFit, match="page pool"):
        replica.submit(Job(9, asked[0], (Stage("answer", "mllm", 400, 0, 64),)))


def test_lanes_that_share_a_device_take_as_long_as_one_after_the_other():
    """Costs that were measured do not say what bounds them, so two at once are each half as fast."""
    jobs = [alone("protector-separate", True, Placement(name, name == "stream")) for name in ("same", "stream")]
    assert jobs[0].finished == pytest.approx(jobs[1].finished)


# The real engine, whose steps take simulated time.


@pytest.mark.parametrize("name", ["off", "protector", "ecso"])
def test_the_simulation_follows_the_real_scheduler(engine: Engine, name: str):
    # how many tokens a detector has of random bytes is not ours to predict: they cost nothing
    guard = 0.0 if name == "protector" else 0.0003
    price = {lane.name: LaneFit(0.004, 0.0007, 0.0002, guard, 0.0, 1, 0.0) for lane in engine.lanes}
    own = FittedCosts(price, "made up")
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
    questions = [f"question {'x' * (7 * number % 40)} {number}" for number in range(14)]
    due = np.cumsum(np.random.default_rng(1).exponential(0.03, len(questions))).tolist()
    guards = [guard_of(name, harmful=number % 3 == 0) for number in range(len(questions))]
    engine.recorder = recorder = Recorder()
    now, waiting, ends = 0.0, list(range(len(questions))), {}
    under_way: dict[int, int] = {}
    replies: dict[int, Reply] = {}
    while waiting or engine.has_work:
        if not engine.has_work and waiting:
            now = max(now, due[waiting[0]])
        while waiting and due[waiting[0]] <= now:
            number = waiting.pop(0)
            request = engine.submit(questions[number], guard=guards[number], sampling=sampling)
            under_way[request.id] = number
        done = len(recorder.steps)
        finished = engine.step()
        for cost in (step_costs([step])[0] for step in recorder.steps[done:]):
            load = StepLoad(cost.decode, cost.prefill, cost.guard)
            now += own.demand(cost.lane, load).seconds
        for reply in finished:
            ends[under_way[reply.id]], replies[under_way[reply.id]] = now, reply
    jobs = []
    for number, arrival in enumerate(due):
        passes = [one for one in replies[number].passes if one.label != "screen"]
        screened = any(one.label == "screen" for one in replies[number].passes)
        program = tuple(
            Stage(
                one.label,
                one.model,
                one.prompt_tokens - one.cached_tokens,
                one.cached_tokens,
                len(one.token_ids),
                screen=screened and bool(one.token_ids),
            )
            for one in passes
        )
        jobs.append(Job(number, Asked(arrival, 1, 20), program))
    models = {stage.model for job in jobs for stage in job.stages} | ({"detector"} if name == "protector" else set())
    simulate([Replica(own, models, Limits(page=16), Placement())], jobs)
    real = np.array([ends[number] - due[number] for number in range(len(due))])
    mine = np.array([job.finished - job.asked.arrival for job in jobs])
    assert np.median(np.abs(mine / real - 1.0)) < 0.02
    assert np.abs(mine / real - 1.0).max() < 0.15


def guard_of(name: str, harmful: bool) -> Guard | None:
    threshold = 2.0 if harmful else 0.0
    later = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
    if name == "protector":
        mender = Detoxify(sampling=later, draft_tokens=0)
        head = HarmHead("detector", threshold=threshold)
        return Guard(head, mender, 1, name=name)
    if name == "ecso":
        judge = SelfJudge(threshold=threshold, min_mass=1e-12)
        return Guard(judge, EyesClosed(sampling=later), 1, name=name)
    return None


# Plans.


def test_more_replicas_are_never_worse():
    known = plan(40.0)
    waits = [known.run("ecso", Placement(), 1.0 / replicas).e2e for replicas in (2, 4, 8, 32)]
    for percent in (50, 95):
        found = [np.percentile(some, percent) for some in waits]
        assert all(more <= few * 1.02 for few, more in pairwise(found))


def test_the_fewest_replicas_hold_the_objective_and_one_less_does_not():
    known = plan(60.0)
    found = find(known, "ecso", Placement())
    assert found.seen.met >= known.target
    assert found.replicas > 2
    assert not known.holds("ecso", Placement(), 1.1 * found.share)
    # the share of a replica does not depend on how many there are
    large = find(replace(known, traffic=replace(known.traffic, rate=60_000.0)), "ecso", Placement())
    assert large.replicas == pytest.approx(1000.0 * known.traffic.requests_per_second / 60.0 / found.share, rel=0.05)


def test_guards_cost_what_their_work_does():
    found, refused = run_capacity(plan(60.0), ["ecso", "probe", "protector-adapter"], [Placement()])
    assert not refused
    share = {guard: one.share for (guard, _), one in found.items()}
    assert share["off"] > share["probe"] > share["ecso"]


def test_an_objective_that_no_number_of_replicas_holds_is_refused_with_the_reason():
    short = replace(plan(), objective=Objective(e2e=0.3))
    found, refused = run_capacity(short, ["ecso"], [Placement()])
    assert ("off", "same") in found
    assert "alone takes" in refused["ecso", "same"]
    with pytest.raises(CannotHold):
        find(short, "ecso", Placement())
    rows = CapacityReport(short, found, refused).rows()
    assert rows[-1]["replicas"] is None and rows[-1]["refused"]


def test_bursts_need_more_than_the_same_rate_spread_out():
    spread, bursts = (find(plan(40.0, burst=burst), "off", Placement()).share for burst in (1, 64))
    assert bursts < spread


def test_a_trace_is_thinned_and_repeated_and_keeps_its_rate():
    trace = tuple(Item(0.25 * number, 16, 0, 8 + number % 3, number % 4 == 0) for number in range(100))
    traffic = Traffic(None, trace=trace)
    assert traffic.requests_per_second == pytest.approx(4.0)
    asked = list(traffic.asked(0.5, 600, 0))
    assert len(asked) == 600
    assert 600 / asked[-1].arrival == pytest.approx(2.0, rel=0.15)
    assert np.mean([one.harmful for one in asked]) == pytest.approx(0.25, abs=0.06)
    assert Traffic(8.0, trace=trace).requests_per_second == 8.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": None},
        {"rate": 0.0},
        {"rate": 1.0, "harmful": 1.5},
        {"rate": 1.0, "burst": 0},
        {"rate": 1.0, "answer": 1},
    ],
)
def test_what_is_no_traffic_is_refused(wrong: dict[str, float]):
    with pytest.raises(BadInput):
        Traffic(**wrong)


def test_unknown_guards_and_placements_are_refused_by_name():
    with pytest.raises(BadInput, match="no guard 'nemo'"):
        run_capacity(plan(), ["nemo"], [Placement()])
    with pytest.raises(BadInput, match="no placement 'moon'"):
        placement_named("moon")
    with pytest.raises(BadInput, match="bench onnx"):
        placement_named("cpu")


def test_costs_on_processor_cores_are_a_line_through_what_onnx_measured(tmp_path: Path):
    rows = [{"batch": 1, "tokens": n, "onnx int8": 5.0 + 0.5 * n} for n in (32, 128, 256)]
    file = tmp_path / "onnx.json"
    known = Session.begin().document("onnx", {}, [*rows, {"batch": 8, "tokens": 32, "onnx int8": 900.0}])
    known.write(file)
    assert outside_costs(file) == pytest.approx((0.005, 0.0005))
    replace(known, rows=rows[:0]).write(file)
    with pytest.raises(BadDocument, match="bench onnx"):
        outside_costs(file)


# Measured runs.


def throughput_run() -> Document:
    """The document of a run with a request a load, whose steps cost what they do here."""
    units = {}
    for level in (1, 2, 4):
        steps = [
            ["mllm", d, p, 0, False, 20, 0.010 + 0.0005 * d + 0.0002 * p, 0.0]
            for d in range(level + 1)
            for p in (0, 54)
        ]
        units[f"closed {level} 0 off"] = {
            "served": [[0.0, 0, 0, 0, 0, 0, 0.3, 0, 24, 54, 0, False]],
            "costs": steps,
            "inside": sum(row[5] * row[6] for row in steps),
            "seconds": 0.3,
            "requests": level,
        }
    settings = {
        "model": "made-up",
        "sizes": {"prompt_tokens": 24, "images": 0, "answer_tokens": 24, "harmful": 0.0},
        "objective": {},
        "release": "verdict",
        "trace": [],
        "burst": 1,
    }
    blank = dict.fromkeys(("load_before", "load_during", "load_after"), 0.0)
    known = ("throughput", settings, [], {"accelerator": None}, {}, None, "", "then", 1.0)
    return Document(*known, **blank, quiet=True, seed=0, units=units)


def test_a_run_is_read_and_others_are_refused():
    document = throughput_run()
    found = read_run(document)
    assert found.sizes == Sizes(template=30)
    assert found.costs.lanes["mllm"].base == pytest.approx(0.010, rel=0.01)
    one = compare(document)[0]  # 24 steps, the first of which reads the prompt
    assert one.predicted_p50 == pytest.approx(24 * 0.0105 + 54 * 0.0002, rel=0.02)
    with pytest.raises(BadDocument, match="has no steps"):
        measured_steps(replace(document, units={}))
    with pytest.raises(BadDocument, match="released it otherwise"):
        compare(replace(document, settings={**document.settings, "release": "audit"}))
    older = {"open 2 0 off": document.units["closed 2 0 off"], **document.units}
    with pytest.raises(BadDocument, match="measure it again"):
        compare(replace(document, units=older))


def test_steps_of_several_rounds_are_pooled():
    some = [StepCost("mllm", 4, 0, 0, False, batches, seconds, 0.0) for batches, seconds in ((30, 0.01), (10, 0.02))]
    assert pooled([*some, StepCost("mllm", 4, 0, 1, False, 5, 0.03, 0.0)]) == [
        StepCost("mllm", 4, 0, 0, False, 40, 0.0125, 0.0),
        StepCost("mllm", 4, 0, 1, False, 5, 0.03, 0.0),
    ]


def test_the_command_answers_the_question_from_a_file_and_refuses_others(tmp_path: Path):
    file, out = tmp_path / "run.json", tmp_path / "capacity.json"
    throughput_run().write(file)
    arguments = ["capacity", "--costs", str(file), "--rate", "30", "--harmful", "0.05", "--guards", "ecso,probe"]
    arguments += ["--objective", "e2e=2s", "--requests", "60", "--json", str(out), "--out", str(tmp_path / "p.html")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "30 requests/s with 5 % harmful answers" in done.output
    assert "30 requests/s" in (tmp_path / "p.html").read_text()
    known = json.loads(out.read_text())
    assert [row["guard"] for row in known["rows"]] == ["off", "ecso", "probe"]
    assert known["rows"][1]["work_over_unguarded"] > known["rows"][2]["work_over_unguarded"] > 0.9
    assert known["assumed"] and known["fit"]["mllm"]["base_ms"] == pytest.approx(10.0, rel=0.01)
    with pytest.raises(BadDocument):
        CliRunner().invoke(app, ["capacity", "--costs", str(out), "--rate", "1"], catch_exceptions=False)


def test_the_roofline_needs_no_run_and_fits_thousands_of_devices():
    paper = roofline_costs(setup_of("llava-1.5-7b", "open-llama-3b"), h200())
    traffic = Traffic(200_000.0, answer=8, images=1)
    large = Plan(paper, gpu_limits(paper), Sizes(image=576), traffic, Objective(e2e=0.5), requests=60)
    assert 500 < find(large, "off", Placement()).replicas < 10_000
