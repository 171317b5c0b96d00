"""Where a server meets others: web pages of other origins, and a collector of spans."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stockade.engine.models.loader import ModelSet
from tests.engine.screened import engine_of
from tests.serving.live import Live, chat, serving

PAGE, CHAT = "https://page.example", "/v1/chat/completions"
ASKING = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_pages_of_other_origins_may_not_ask_unless_they_are_listed(models: ModelSet, live: Live) -> None:
    with live.client() as client:
        assert client.options(CHAT, headers=ASKING).status_code == 405
        said = client.post(CHAT, json=chat(max_tokens=2), headers={"Origin": PAGE})
        assert said.status_code == 200 and "access-control-allow-origin" not in said.headers
    with serving(engine_of(models, 200), origins=(PAGE,)) as open_one, open_one.client() as client:
        allowed = client.options(CHAT, headers=ASKING)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in allowed.headers
        said = client.post(CHAT, json=chat(max_tokens=2), headers={"Origin": PAGE})
        assert said.headers["access-control-allow-origin"] == PAGE
        refused = client.options(CHAT, headers={**ASKING, "Origin": "https://other.example"})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An address that takes whatever is posted, and what was."""
    taken: list[tuple[str, bytes]] = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_spans_reach_a_collector_and_hold_no_text(models: ModelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    trace = "0af7651916cd43dd8448eb211c80319c"
    with collector() as (address, taken):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with serving(engine_of(models, 200), traces=True) as live, live.client() as client:
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            said = client.post(CHAT, json=chat("xyzzy", guard={"policy": "harmful"}), headers=headers).json()
            ends = time.monotonic() + 20
            while not taken and time.monotonic() < ends:
                time.sleep(0.02)
    assert taken and {path for path, _ in taken} == {"/v1/traces"}
    assert all(b"xyzzy" not in body for _, body in taken)
    spans = [
        span
        for _, body in taken
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {"stockade.request", "stockade.answer", "stockade.rewrite"} <= {span.name for span in spans}
    assert {span.trace_id.hex() for span in spans} == {trace}
    root = next(span for span in spans if span.name == "stockade.request")
    facts = {one.key: one.value.string_value for one in root.attributes}
    assert facts["gen_ai.response.id"] == said["id"] and facts["stockade.outcome"] == said["guard"]["outcome"]
