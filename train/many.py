"""Many chats through the engine, a number of them under way at a time; replies come as they are done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..engine.engine import Engine, GuardLike, Request
from ..engine.errors import BadInput
from ..engine.request import Reply
from ..engine.sampling import SamplingParams

AHEAD = 64  # chats under way at a time


def answer_many(
    engine: Engine,
    chats: Iterable[Any],
    guard: GuardLike | Sequence[GuardLike] | None,
    sampling: SamplingParams,
    ahead: int = AHEAD,
) -> Iterator[tuple[int, Reply | BadInput]]:
    """(the chat's number, its reply, or why it could not be asked). guard: of all chats, or one of each. Closing the
    iterator aborts what is under way."""
    waiting = enumerate(chats)
    under_way: dict[int, Request] = {}
    more = True
    try:
        while more or under_way:
            while more and len(under_way) < ahead:
                number, chat = next(waiting, (-1, None))
                if number < 0:
                    more = False
                    break
                own = guard[number] if isinstance(guard, Sequence) else guard
                try:
                    under_way[number] = engine.submit(chat, guard=own, sampling=sampling)
                except BadInput as error:
                    yield number, error
            if under_way:
                engine.step()
            for number in [number for number, request in under_way.items() if request.reply is not None]:
                reply = under_way.pop(number).reply
                assert reply is not None
                yield number, reply
    finally:
        for request in under_way.values():
            engine.abort(request.id)
