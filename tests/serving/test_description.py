"""The server does what its OpenAPI description says, for requests that are drawn from the description."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.serving.live import Live

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

positive_data_acceptance = schemathesis.checks.positive_data_acceptance
EXAMPLES = 5  # of each endpoint, in either kind
ENDPOINTS = 11  # at least


def test_replies_are_as_described(live: Live) -> None:
    """Requests that fit the description, and some that do not: each status is listed, each body has its schema."""
    tried = 0
    for found in schemathesis.openapi.from_url(f"{live.url}/openapi.json").get_all_operations():
        operation = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue  # they take nothing

            @seed(0)
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def replies(case: Any) -> None:
                # a description cannot say all that makes sense, such as whose turn is the last
                case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=30)

            replies()
        tried += 1
    assert tried >= ENDPOINTS
