"""Where a reply's time went, from scripted steps: shares, overlaps, gaps, and the trace that viewers read."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockade.engine.request import FinishReason, Outcome, PassRecord, Reply, Trace
from stockade.engine.trace import COLORS, Breakdown, Recorder, StepRecord, StepWork, kind_of

START = 1000.0  # perf_counter begins anywhere


def reply(number: int = 0, total: float = 1.0, labels: tuple[str, ...] = ("answer",)) -> Reply:
    passes = [
        PassRecord(label, "mllm", finished=total, candidate=label in ("answer", "rewrite", "eyes_closed"))
        for label in labels
    ]
    return Reply(number, "", [], Outcome.CLEAN, FinishReason.STOP, passes=passes, trace=Trace(total=total))


def work(role: str, tokens: int = 1, label: str = "answer", request: int = 0, number: int = 0) -> StepWork:
    return StepWork(request, number, label, role, "mllm", tokens)


def step(began: float, ended: float, *works: StepWork, vision: float = 0.0, lane: str = "mllm") -> StepRecord:
    return StepRecord(lane, START + began, START + ended, vision, works)


def recorded(*steps: StepRecord, replies: tuple[Reply, ...] = (reply(),)) -> Recorder:
    recorder = Recorder()
    for one in steps:
        recorder.record(one)
    for one in replies:
        recorder.finish(one, START)
    return recorder


def seconds(breakdown: Breakdown) -> dict[str, float]:
    return {name: pytest.approx(value) for name, value in breakdown.to_dict().items() if value}


def test_a_guarded_reply_from_submission_to_verdict() -> None:
    recorder = recorded(
        step(0.1, 0.4, work("prefill", 600), vision=0.1),
        step(0.4, 0.5, work("decode")),
        step(0.5, 0.6, work("screen", 16, "screen", number=1), lane="detector"),
        step(0.6, 0.7, work("decode")),
        step(0.7, 0.75, work("screen", 3, "screen", number=1), lane="detector"),
        step(0.75, 0.95, work("prefill", 9, "judge", number=2)),
        replies=(reply(labels=("answer", "screen", "judge")),),
    )
    assert seconds(recorder.breakdown(recorder.replies[0])) == {
        "vision": 0.1,
        "prefill": 0.2,
        "decode": 0.2,
        "screening_hidden": 0.1,
        "screening_exposed": 0.05,
        "judge": 0.2,
        "gaps": 0.15,
    }


def test_a_step_for_several_passes_of_a_reply_is_split_by_their_tokens() -> None:
    recorder = recorded(step(0.0, 1.0, work("decode", 1), work("screen", 4, number=1), vision=0.5))
    assert seconds(recorder.breakdown(recorder.replies[0])) == {
        "vision": 0.5,
        "decode": 0.1,
        "screening_hidden": 0.4,
    }


def test_a_step_shared_with_other_replies_counts_in_full_for_each_and_one_without_it_is_its_queue() -> None:
    together = step(0.0, 0.6, work("decode"), work("prefill", 99, request=1))
    recorder = recorded(together, step(0.6, 1.0, work("decode", request=1)), replies=(reply(0), reply(1)))
    assert seconds(recorder.breakdown(recorder.replies[0])) == {"decode": 0.6, "queue": 0.4}
    assert seconds(recorder.breakdown(recorder.replies[1])) == {"prefill": 0.6, "decode": 0.4}
    assert seconds(recorder.breakdown()) == {"prefill": 0.6, "decode": 1.0, "queue": 0.4}


def test_lanes_that_run_at_once_share_the_time_and_nothing_counts_twice() -> None:
    recorder = recorded(
        step(0.0, 0.6, work("decode")),
        step(0.2, 1.0, work("screen", 32, "screen", number=1), lane="detector"),
    )
    found = recorder.breakdown(recorder.replies[0])
    assert seconds(found) == {"decode": 0.4, "screening_exposed": 0.6}


def test_screening_a_rewrite_is_hidden_while_that_is_decoded() -> None:
    recorder = recorded(
        step(0.0, 0.2, work("decode")),
        step(0.2, 0.3, work("screen", 8, "screen", number=1)),
        step(0.3, 0.6, work("decode", 1, "rewrite", number=2)),
        step(0.6, 0.7, work("screen", 8, "screen", number=3)),
        step(0.7, 0.9, work("draft", 4, "rewrite", number=2)),
        step(0.9, 1.0, work("screen", 8, "screen", number=3)),
        replies=(reply(labels=("answer", "screen", "rewrite", "screen")),),
    )
    found = recorder.breakdown(recorder.replies[0])
    assert seconds(found) == {
        "decode": 0.2,
        "screening_exposed": 0.2,
        "rewrite": 0.5,
        "screening_hidden": 0.1,
    }
    assert found.remedy == pytest.approx(0.5)


def test_work_ahead_of_the_verdict_is_the_remedys_and_does_not_prolong_the_answer() -> None:
    assert kind_of(work("speculative", 64)) == "rewrite"
    assert kind_of(work("speculative", 64, "caption")) == "caption"
    recorder = recorded(
        step(0.0, 0.4, work("decode")), step(0.5, 0.6, work("speculative", 64)), step(0.6, 1.0, work("score"))
    )
    assert recorder.breakdown().screening_exposed == pytest.approx(0.4)


@st.composite
def scripts(draw: st.DrawFn) -> Recorder:
    """Steps of two lanes, which may overlap each other and both ends of the replies."""
    steps = []
    for lane in ("mllm", "detector"):
        at = draw(st.floats(-0.5, 0.5))
        for _ in range(draw(st.integers(0, 6))):
            began = at + draw(st.floats(0.0, 0.3))
            at = began + draw(st.floats(0.0, 0.5))
            roles = draw(
                st.lists(st.sampled_from(["decode", "prefill", "screen", "judge", "draft"]), min_size=1, max_size=4)
            )
            works = [work(role, draw(st.integers(0, 9)), request=draw(st.integers(0, 2))) for role in roles]
            steps.append(step(began, at, *works, vision=draw(st.floats(0.0, 0.6)), lane=lane))
    steps.sort(key=lambda one: one.ended)
    return recorded(*steps, replies=(reply(0, draw(st.floats(0.0, 2.0))), reply(1, draw(st.floats(0.0, 2.0)))))


@given(scripts())
def test_the_parts_add_up_to_the_whole_reply(recorder: Recorder) -> None:
    for one in recorder.replies:
        found = recorder.breakdown(one)
        assert found.total == pytest.approx(one.trace.total, abs=1e-9)
        assert min(found.to_dict().values()) >= 0.0
    assert recorder.breakdown().total == pytest.approx(sum(one.trace.total for one in recorder.replies), abs=1e-9)


@given(scripts())
def test_the_trace_is_what_viewers_read(recorder: Recorder) -> None:
    trace = json.loads(json.dumps(recorder.chrome_trace(), allow_nan=False))
    threads: dict[int, list[dict[str, Any]]] = defaultdict(list)
    open_events: dict[tuple[str, str], int] = defaultdict(int)
    for event in trace["traceEvents"]:
        assert event["pid"] == 1 and isinstance(event["tid"], int) and event["name"]
        match event["ph"]:
            case "X":
                assert event["ts"] >= 0.0 and event["dur"] >= 0.0 and event["cname"] in COLORS.values()
                threads[event["tid"]].append(event)
            case "b":
                open_events[event["cat"], event["id"]] += 1
            case "e":
                open_events[event["cat"], event["id"]] -= 1
                assert open_events[event["cat"], event["id"]] == 0
            case phase:
                assert phase == "M" and event["name"] in ("process_name", "thread_name", "thread_sort_index")
    assert not any(open_events.values())
    for events in threads.values():
        for earlier, later in pairwise(events):
            assert earlier["ts"] + earlier["dur"] <= later["ts"] + 1e-3


def test_lanes_gaps_and_requests_of_the_trace() -> None:
    recorder = recorded(
        step(0.1, 0.3, work("decode", 1), work("screen", 3, number=1), vision=0.04),
        step(0.3, 0.5, work("screen", 7, number=1), lane="detector"),
    )
    events = recorder.chrome_trace()["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    shown = [
        (threads[event["tid"]], event["name"], round(event["ts"]), round(event["dur"]))
        for event in events
        if event["ph"] == "X"
    ]
    host = "host: no batch runs"
    assert shown == [
        ("mllm", "vision", 100_000, 40_000),
        ("mllm", "decode", 140_000, 40_000),
        ("mllm", "screening_hidden", 180_000, 120_000),
        ("detector", "screening_exposed", 300_000, 200_000),
        (host, "gaps", 0, 100_000),
        (host, "gaps", 500_000, 500_000),
    ]
    assert [(e["ph"], e["name"], e["ts"]) for e in events if e.get("cat") == "request"] == [
        ("b", "request 0", 0.0),
        ("e", "request 0", 1e6),
    ]


def test_a_recorder_to_which_nothing_happened() -> None:
    recorder = Recorder()
    assert recorder.breakdown() == Breakdown()
    assert all(event["ph"] == "M" for event in recorder.chrome_trace()["traceEvents"])


def test_the_slices_of_a_step_fill_it() -> None:
    recorder = recorded(step(0.0, 1.0, work("decode", 1), work("prefill", 2), work("draft", 1), vision=0.2))
    ((_, found),) = recorder.slices()
    assert [(one.kind, pytest.approx(one.ended - one.began)) for one in found] == [
        ("vision", 0.2),
        ("decode", 0.4),
        ("prefill", 0.4),
    ]
