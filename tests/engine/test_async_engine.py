"""The stepping thread behind asyncio: what it says is what the engine says, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from stockade import AsyncEngine, Detoxify, Engine, Guard, HarmHead, Replaced, SamplingParams
from stockade.engine import async_engine
from stockade.engine.errors import (
    Aborted,
    BadInput,
    DeadlineExceeded,
    EmptyChat,
    EngineStopped,
    InvalidGuard,
    Overloaded,
)
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.request import Outcome
from tests.engine.screened import assert_empty, engine_of

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
MIDDLE = SamplingParams(max_tokens=40, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
CLEAR = Guard(HarmHead(template="response", threshold=0.0, chunk=2))


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )


def run(
    models: ModelSet, body: Callable[[AsyncEngine], Coroutine[Any, Any, None]], **options: Any
) -> tuple[AsyncEngine, Engine]:
    """Run the body with an engine of its own; afterwards nothing of it is left."""
    engine = engine_of(models, 200)

    async def whole() -> AsyncEngine:
        async with AsyncEngine(engine, **options) as served:
            await asyncio.wait_for(body(served), 60)
        return served

    served = asyncio.run(whole())
    assert not served.alive and not served.ready and served.under_way == 0
    engine.step()
    engine.check_integrity()
    assert_empty(engine)
    return served, engine


async def text_of(stream: Any) -> str:
    return "".join([piece async for piece in stream])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_many_chats_at_once_get_what_each_gets_alone(models: ModelSet) -> None:
    texts = [f"Question number {number}?" for number in range(12)]
    alone = [engine_of(models).chat([text], guard=CLEAR, sampling=SHORT)[0] for text in texts]

    async def body(served: AsyncEngine) -> None:
        replies = await asyncio.gather(*(served.chat(text, guard=CLEAR, sampling=SHORT) for text in texts))
        streamed = await asyncio.gather(
            *(
                text_of(served.stream(text, guard=CLEAR, sampling=SHORT, release=release))
                for text in texts
                for release in ("verdict", "window", "audit")
            )
        )
        assert [reply.text for reply in replies] == [reply.text for reply in alone]
        assert streamed == [reply.text for reply in alone for _ in range(3)]
        assert served.ready and served.alive

    _, engine = run(models, body)
    assert engine.steps < 12 * 4 * 8  # together, not one after another


def test_bad_input_is_refused_with_the_engine_s_own_errors_and_leaves_no_trace(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        with pytest.raises(EmptyChat):
            await served.chat([])
        with pytest.raises(BadInput):
            await served.chat([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}])
        with pytest.raises(InvalidGuard):
            await served.chat("Hi", guard=Guard(HarmHead("nobody")))
        assert served.under_way == 0
        assert (await served.chat("Hi", sampling=SHORT)).outcome is Outcome.UNGUARDED

    run(models, body)


def test_canceling_a_task_or_closing_a_stream_aborts_the_request(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        task = asyncio.create_task(served.chat("Hi", sampling=LONG))
        await until(lambda: served.engine.has_work)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = served.stream("Hi", sampling=LONG)
        assert isinstance(await anext(stream), str)
        await stream.aclose()
        await until(lambda: not served.under_way)
        assert not served.engine.has_work

    run(models, body)


def test_a_task_canceled_while_it_submits_leaves_nothing(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        for pause in (0.0, 0.0005, 0.001, 0.002):
            tasks = [asyncio.create_task(served.chat(f"Hi {n}", sampling=LONG)) for n in range(8)]
            await asyncio.sleep(pause)
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in done)
        await until(lambda: not served.under_way)

    run(models, body)


def test_more_requests_than_are_let_in_are_refused_and_room_comes_back(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        first = [await served.submit("Hi", sampling=LONG) for _ in range(2)]
        with pytest.raises(Overloaded) as refused:
            await served.submit("Hi")
        assert refused.value.retry_after > 0
        assert served.under_way == 2
        first[0].abort()
        with pytest.raises(Aborted):
            await first[0].reply()
        await served.chat("Hi", sampling=SHORT)
        first[1].abort()

    run(models, body, max_requests=2)


def test_a_deadline_ends_a_request_with_its_own_error(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        with pytest.raises(DeadlineExceeded):
            await served.chat("Hi", sampling=LONG, timeout=0.03)
        assert (await served.chat("Hi", sampling=SHORT, timeout=30)).text

    run(models, body)


def test_a_request_ends_at_its_deadline_even_where_a_step_hangs(
    models: ModelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "GRACE", 0.05)
    monkeypatch.setattr(async_engine, "STALLED", 0.1)
    goes_on = threading.Event()

    async def body(served: AsyncEngine) -> None:
        run_batch = served.engine.runner.run

        def hang(lane: Any, works: Any) -> Any:
            goes_on.wait(20)
            return run_batch(lane, works)

        served.engine.runner.run = hang  # type: ignore[method-assign]
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await served.chat("Hi", sampling=LONG, timeout=0.1)
        assert time.monotonic() - began < 10
        assert served.alive and not served.ready
        goes_on.set()
        await until(lambda: served.ready and not served.under_way)

    run(models, body)


def test_a_crash_of_the_stepping_thread_ends_every_request_with_a_typed_error(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        tasks = [asyncio.create_task(served.chat(f"Hi {n}", sampling=LONG)) for n in range(5)]
        await until(lambda: served.engine.has_work)

        def broken(*_: Any) -> Any:
            raise MemoryError("no room for anything")

        served.engine.scheduler.schedule = broken  # type: ignore[method-assign]
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, EngineStopped) for one in ended)
        assert "MemoryError" in str(ended[0]) and "no room" not in str(ended[0])
        assert not served.alive and not served.ready and served.under_way == 0
        with pytest.raises(EngineStopped):
            await served.chat("Hi")
        with pytest.raises(EngineStopped):
            await served.call(lambda engine: engine.steps)
        await served.drain(1.0)

    engine = engine_of(models, 200)

    async def whole() -> None:
        async with AsyncEngine(engine) as served:
            await asyncio.wait_for(body(served), 60)

    asyncio.run(whole())


def test_draining_lets_what_is_under_way_finish_and_nobody_new_in(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        task = asyncio.create_task(served.chat("Hi", sampling=LONG))
        await until(lambda: served.engine.has_work)
        draining = asyncio.create_task(served.drain())
        await until(lambda: not served.ready)
        assert served.alive
        with pytest.raises(EngineStopped):
            await served.chat("Hi")
        assert len((await task).token_ids) == 400
        await draining

    run(models, body)


def test_a_drain_that_takes_too_long_ends_the_rest_with_a_typed_error(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        task = asyncio.create_task(served.chat("Hi", sampling=LONG))
        await until(lambda: served.engine.has_work)
        await served.drain(0.0)
        with pytest.raises(EngineStopped):
            await task

    run(models, body)


def test_streams_that_nobody_reads_cost_no_steps(models: ModelSet) -> None:
    async def body(served: AsyncEngine) -> None:
        streams = [served.stream(f"Hi {n}", sampling=SHORT) for n in range(20)]
        for stream in streams:
            await anext(stream)
        await until(lambda: not served.engine.has_work)
        steps = served.engine.steps
        await asyncio.sleep(0.1)
        assert served.engine.steps == steps
        for stream in streams:
            assert await text_of(stream)

    run(models, body)


def test_a_replaced_beginning_comes_as_an_event(models: ModelSet) -> None:
    shown_then_harmful = Guard(HarmHead(template="response", threshold=1.0, prefix_threshold=0.0, chunk=1))

    async def body(served: AsyncEngine) -> None:
        stream = served.stream("Hi", guard=shown_then_harmful, sampling=MIDDLE, release="window")
        items = [item async for item in stream]
        *shown, last = items
        assert isinstance(last, Replaced) and last.released == "".join(str(item) for item in shown) != ""

    run(models, body)


def test_a_watched_request_tells_of_its_passes_and_scores(models: ModelSet) -> None:
    harmful = Guard(HarmHead(template="response", threshold=1.0, chunk=2), Detoxify(), max_rounds=1)

    async def body(served: AsyncEngine) -> None:
        request = await served.begin(lambda e: e.submit("Hi", guard=harmful, sampling=MIDDLE), watched=True)
        seen = []
        while not request.done:
            await request.changed()
            seen += request.progress
        labels = {one.label for one in seen}
        assert {"answer", "rewrite"} <= labels
        assert any(one.score is not None and 0 <= one.score <= 1 for one in seen)
        assert all(one.ended for one in request.progress)

    run(models, body)


def test_two_engines_and_two_event_loops_in_one_process(models: ModelSet) -> None:
    one, two = AsyncEngine(engine_of(models)), AsyncEngine(engine_of(models))
    found: list[str] = []

    def other_loop() -> None:
        async def both() -> None:
            found.append((await one.chat("Hi", sampling=SHORT)).text)
            found.append((await two.chat("Hi", sampling=SHORT)).text)

        asyncio.run(both())

    threads = [threading.Thread(target=other_loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    one.close()
    two.close()
    assert len(found) == 6 and len(set(found)) == 1


def test_an_event_loop_that_is_gone_takes_its_requests_with_it(models: ModelSet) -> None:
    served = AsyncEngine(engine_of(models))
    loop = asyncio.new_event_loop()
    request = loop.run_until_complete(served.submit("Hi", sampling=LONG, streaming=True))
    loop.close()
    ends = time.monotonic() + 20
    while served.under_way and time.monotonic() < ends:
        time.sleep(0.005)
    assert served.under_way == 0 and served.alive and not request.done
    served.close()
    gc.collect()
