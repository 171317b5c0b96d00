"""What a server counts, for Prometheus, in a registry of its own. It measures nothing: it is told of replies."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..async_engine import AsyncEngine
from ..request import FinishReason, Outcome, Reply

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
# Reasons of verdicts that failed; any other may hold words of a text, or never end.
REASONS = ("timeout", "too_long", "nonsense", "empty", "not screened")


def known_reason(error: str | None) -> str | None:
    """Why a verdict failed, in a word that holds nothing of any text."""
    if error is None:
        return None
    return error if error in REASONS else "failed"


class Metrics:
    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"stockade_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"stockade_{name}", what, labels, registry=self.registry, buckets=buckets)

        self._requests = counter("requests", "Requests by how they ended", "endpoint", "policy", "outcome")
        self._refused = counter("refused_requests", "Requests answered with an error", "status", "code")
        self._verdicts = counter("verdicts", "Verdicts by detector", "detector", "harmful")
        self._closed = counter("fail_closed", "Verdicts that failed, hence harmful, by reason", "detector", "reason")
        self._rounds = counter("remedies", "Answers that a remedy gave", "policy")
        self._unscreened = counter("unscreened_characters", "Characters shown before a verdict covered them")
        self._tokens = counter("tokens", "Tokens by model and kind", "model", "kind")
        self._seconds = histogram("request_seconds", "From submission to reply", _SECONDS, "policy")
        self._guard = histogram("guard_added_seconds", "Waited for the guard", _SECONDS, "policy", "outcome")
        self._queued = histogram("queue_seconds", "From submission to the first step", _SECONDS)
        self._first = histogram("first_token_seconds", "From submission to the first token", _SECONDS)
        self._between = histogram("inter_token_seconds", "Between two tokens, mean of an answer", _TOKEN_SECONDS)
        self.sent_first = histogram("first_text_seconds", "Until the first text left", _SECONDS, "release")

        def gauge(name: str, what: str, value: object) -> None:
            Gauge(f"stockade_{name}", what, registry=self.registry).set_function(value)  # type: ignore[arg-type]

        inner = engine.engine
        gauge("requests_under_way", "Requests let in that have not ended", lambda: engine.under_way)
        gauge("requests_limit", "Requests that are let in at once", lambda: engine.max_requests)
        gauge("ready", "Whether a request would be let in and served", lambda: engine.ready)
        gauge("steps", "Steps of the engine so far", lambda: inner.steps)
        gauge("sequences_running", "Sequences with pages", lambda: sum(len(lane.running) for lane in inner.lanes))
        gauge("sequences_waiting", "Sequences without", lambda: sum(len(lane.waiting) for lane in inner.lanes))
        gauge("pool_pages_owned", "Pages in use", lambda: inner.pool.owned_pages)
        gauge("pool_pages_cached", "Pages kept for a prefix that comes again", lambda: inner.pool.cached_pages)
        gauge("pool_evictions", "Pages that made room so far", lambda: inner.pool.evictions)

    def refused(self, status: int, code: str) -> None:
        self._refused.labels(str(status), code).inc()

    def ended(self, endpoint: str, policy: str, outcome: str) -> None:
        """A request ended, with or without a reply."""
        self._requests.labels(endpoint, policy, outcome).inc()

    def replied(self, endpoint: str, policy: str, reply: Reply) -> None:
        """A request ended, and the engine has something to say of it."""
        trace = reply.trace
        for name, usage in reply.usage.items():
            self._tokens.labels(name, "prompt").inc(usage.prompt)
            self._tokens.labels(name, "cached").inc(usage.cached)
            self._tokens.labels(name, "generated").inc(usage.generated)
        self._unscreened.inc(trace.unscreened_characters)
        if reply.finish_reason in (FinishReason.ABORTED, FinishReason.ERROR):
            return
        self.ended(endpoint, policy, reply.outcome.value)
        for verdict in reply.verdicts:
            self._verdicts.labels(verdict.detector, str(verdict.harmful).lower()).inc()
            reason = known_reason(verdict.error)
            if reason is not None:
                self._closed.labels(verdict.detector, reason).inc()
        remedies = sum(record.candidate and record.label != "answer" for record in reply.passes)
        self._rounds.labels(policy).inc(remedies)
        self._seconds.labels(policy).observe(trace.total)
        self._queued.observe(trace.queued)
        if reply.outcome is not Outcome.UNGUARDED:
            self._guard.labels(policy, reply.outcome.value).observe(trace.guard)
        if trace.first_token is not None:
            self._first.observe(trace.first_token)
        for record in reply.passes:
            many = len(record.token_ids) - 1
            if record.candidate and record.first_token is not None and record.finished is not None and many > 0:
                self._between.observe((record.finished - record.first_token) / many)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
