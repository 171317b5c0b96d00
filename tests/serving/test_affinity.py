"""Which replica a request goes to: the same for the same beginning, another where that one is busy."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from stockade.engine.serving.affinity import BEGINNING, affinity_key, ranked

NAMES = ["a", "b", "c"]


def key(text: str = "Hi", image: str | None = None, tenant: str = "somebody", **more: Any) -> str:
    parts: list[Any] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
    return affinity_key(tenant, json.dumps({"messages": [{"role": "user", "content": parts}], **more}).encode())


def test_a_key_hangs_on_tenant_image_and_beginning_alone() -> None:
    assert key("Hi") == key("Hi", max_tokens=5, stream=True) != key("Ho")
    assert key("Hi", "data:1") == key("Hi", "data:1") != key("Hi", "data:2") != key("Hi")
    assert key("Hi", tenant="other") != key("Hi")
    begun = "x" * BEGINNING
    assert key(begun + " and one end") == key(begun + " and another")
    assert key(begun[1:] + "a") != key(begun[1:] + "b")


def test_a_conversation_that_goes_on_keeps_its_key() -> None:
    first = [{"role": "system", "content": "s" * 600}, {"role": "user", "content": "Why?"}]
    more = [*first, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    other = [first[0], {"role": "user", "content": "How?"}]
    keys = [affinity_key("t", json.dumps({"messages": turns}).encode()) for turns in (first, more, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"no json", b"[" * 100_000, b'{"messages": 1}', b'{"messages": [1, {"content": [2, {"text": 3}]}]}',
        b'{"messages": [{"content": [{"image_url": {"url": 1}}]}]}', b'{"prompt": [1, 2], "input": {}}', b"[]",
        b'{"input": "\\ud800"}',
    ],
)  # fmt: skip
def test_whatever_is_sent_has_a_key(body: bytes) -> None:
    assert len(affinity_key("t", body)) == 64


def test_keys_are_spread_and_a_replica_that_goes_moves_its_own_only() -> None:
    keys = [str(number) for number in range(600)]
    loads = dict.fromkeys(NAMES, 0)
    first = {one: ranked(one, loads, 4)[0] for one in keys}
    assert min(Counter(first.values()).values()) > 150
    without = {name: 0 for name in NAMES if name != "b"}
    for one in keys:
        assert sorted(ranked(one, loads, 4)) == NAMES
        if first[one] != "b":
            assert ranked(one, without, 4)[0] == first[one]


def test_a_busy_replica_stands_back_until_it_is_as_idle_as_the_others() -> None:
    home, second, third = ranked("some key", dict.fromkeys(NAMES, 0), 4)
    assert ranked("some key", {home: 3, second: 0, third: 0}, 4) == [home, second, third]
    assert ranked("some key", {home: 4, second: 0, third: 0}, 4) == [second, third, home]
    assert ranked("some key", {home: 9, second: 6, third: 9}, 4) == [home, second, third]
    assert ranked("some key", {home: 9, second: 6, third: 1}, 4) == [third, home, second]
    assert ranked("some key", {}, 4) == []
