"""A driver for guard loops: feeds scripted results to a generator and keeps the passes it yields."""

from collections.abc import Generator
from typing import Any, NamedTuple

import pytest


class Played(NamedTuple):
    result: Any
    passes: list[Any]


def _play(generator: Generator[Any, Any, Any], *script: Any) -> Played:
    """Sends each item of the script in turn, throws it if it is an exception; the script must fit exactly."""
    passes = []
    left = list(script)
    try:
        asked = next(generator)
        while True:
            passes.append(asked)
            assert left, f"nothing scripted for {asked}"
            item = left.pop(0)
            asked = generator.throw(item) if isinstance(item, BaseException) else generator.send(item)
    except StopIteration as stop:
        assert not left, f"never asked for {left}"
        return Played(stop.value, passes)


@pytest.fixture(scope="session")
def play():
    return _play
