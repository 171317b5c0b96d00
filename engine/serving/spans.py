"""A reply as OpenTelemetry spans: one for the request, one for each of its passes. An optional extra.

Spans are made when the reply is there, from the times it carries; no text stands in them.
"""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING

from ..request import PassRecord, Reply
from .policy import Chosen

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Spans:
    """provider: where spans go; exporters are its owner's business."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("stockade")

    def record(self, name: str, chosen: Chosen, reply: Reply, parent: str | None = None) -> None:
        """Tell of a reply that has just left. parent: the client's `traceparent` header."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        began = time_ns() - int(reply.trace.total * 1e9)
        above = None if parent is None else TraceContextTextMapPropagator().extract({"traceparent": parent})
        root = self._tracer.start_span("stockade.request", above, start_time=began)
        root.set_attributes(
            {
                "gen_ai.response.id": name,
                "stockade.policy": chosen.policy,
                "stockade.release": chosen.release,
                "stockade.outcome": reply.outcome.value,
                "stockade.added_seconds": reply.trace.guard,
                "stockade.unscreened_characters": reply.trace.unscreened_characters,
            }
        )
        inside = set_span_in_context(root)
        for record in reply.passes:
            if record.finished is None:
                continue
            span = self._tracer.start_span(
                f"stockade.{record.label}", inside, start_time=began + int(record.submitted * 1e9)
            )
            span.set_attributes(_attributes(record))
            span.end(began + int(record.finished * 1e9))
        root.end(began + int(reply.trace.total * 1e9))


def _attributes(record: PassRecord) -> dict[str, str | int | float | bool]:
    facts: dict[str, str | int | float | bool] = {
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": len(record.token_ids),
        "stockade.cached_tokens": record.cached_tokens,
        "stockade.preemptions": record.preemptions,
        "stockade.failed": record.error is not None,
    }
    if record.verdict is not None:
        facts["stockade.harmful"] = record.verdict.harmful
        if record.verdict.score == record.verdict.score:
            facts["stockade.score"] = record.verdict.score
    return facts
