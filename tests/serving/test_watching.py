"""What operators see: the dashboard asks for metrics that exist, and spans tell of every pass without its text."""

from __future__ import annotations

import json
import re
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stockade import AsyncEngine, SamplingParams
from stockade.engine.models.loader import ModelSet
from stockade.engine.serving import launch
from stockade.engine.serving.metrics import Metrics, known_reason
from stockade.engine.serving.policy import Chosen
from stockade.engine.serving.spans import Spans
from tests.engine.screened import engine_of
from tests.serving.live import HARMFUL, Live, chat

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_dashboard_s_metrics_all_exist(models: ModelSet) -> None:
    served = AsyncEngine(engine_of(models))
    known = set(re.findall(r"^# TYPE (\w+)", Metrics(served).text().decode(), re.M))
    served.close()
    dashboard = json.loads((Path(launch.__file__).parent / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name.removesuffix("_bucket")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"stockade_\w+", target["expr"])
    }
    assert len(asked) > 12 and asked <= known


def test_a_reason_that_could_hold_a_text_is_told_as_failed_only() -> None:
    assert [known_reason(error) for error in (None, "timeout", "cannot decode 'somebody's words'")] == [
        None,
        "timeout",
        "failed",
    ]


def test_a_reply_becomes_a_span_with_one_for_each_pass(models: ModelSet) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    reply = engine_of(models).chat(["Hi"], guard=HARMFUL, sampling=SamplingParams(max_tokens=8, ignore_eos=True))[0]
    Spans(provider).record("chatcmpl-1", Chosen("protector", HARMFUL, "verdict"), reply, PARENT)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans["stockade.request"]
    assert {"stockade.answer", "stockade.rewrite"} <= set(spans)
    assert root.parent is not None and f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert root.attributes is not None and root.attributes["stockade.outcome"] == "refused"
    for name, span in spans.items():
        assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time
        if name != "stockade.request":
            assert span.parent is not None and span.parent.span_id == root.context.span_id
    told = json.dumps([dict(span.attributes or {}) for span in spans.values()])
    assert reply.passes[0].text and reply.passes[0].text not in told
    assert "stockade.score" in told


def test_a_server_s_metrics_hold_nothing_of_a_text(live: Live) -> None:
    with live.client() as client:
        client.post("/v1/chat/completions", json=chat("a word nobody says: xyzzy"))
        assert "xyzzy" not in client.get("/metrics").text
