"""Decoding steps over static buffers: which shape a batch is rounded up to, and what the buffers then hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from stockade.engine.decoding import Decoding, Row, Shape, Shapes
from stockade.engine.engine import Engine
from stockade.engine.errors import DoesNotFit
from stockade.engine.models.attached import AttachedAdapter
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.sampling import SamplingParams, sample_ids
from stockade.engine.scheduler import Work
from stockade.engine.warm_up import warm_up
from stockade.kernels import backend
from stockade.kernels.lora import LowRank
from stockade.kernels.sampling import SamplingRows
from stockade.kernels.triton.common import Launch
from tests.conftest import BASE
from tests.engine.screened import engine_of, probe_on, with_models

SEEDED = SamplingParams(
    max_tokens=40, ignore_eos=True, temperature=0.7, top_p=0.9, top_k=7, min_p=0.05, seed=(1 << 64) - 3
)


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.VARIABLE, "reference")
        return load_models(checkpoint("llama-gqa"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def decoding_of(engine: Engine) -> Decoding:
    return engine.runner._decoding[id(engine.lanes[0])]


def started(models: ModelSet, *params: SamplingParams, length: int = 20) -> tuple[Engine, list[Work]]:
    """An engine whose next batch decodes one sequence for each of the parameters."""
    engine = engine_of(models)
    for index, one in enumerate(params):
        engine.submit_prompt(list(range(5 + index, 5 + index + length + index)), one)
    engine.step()
    return engine, engine.scheduler.schedule(engine.lanes[0])


def test_shapes_are_few_and_cover_every_batch() -> None:
    shapes = Shapes(100, 5000, [2, 2])
    assert shapes.rows == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 100]
    assert shapes.lengths == [1024, 4096, 5000]
    assert shapes.fitting(3, 1024, None) == Shape(4, 1024, None)
    assert shapes.fitting(9, 1025, 2) == Shape(16, 4096, 2)
    assert shapes.fitting(100, 5000, None) == Shape(100, 5000, None)
    every = shapes.all()
    assert every[0] == (100, 5000, None, False) and len(every) == len(set(every)) == 13 * 3 * 2
    assert {shape.pooled for shape in every[: 13 * 3]} == {None}  # those of plain answers first
    assert Shapes(1, 512).all() == [Shape(1, 512)]
    assert Shapes(1, 512, adapters=True).all() == [Shape(1, 512), Shape(1, 512, None, True)]


def test_buffers_hold_each_row_and_padding_that_touches_nothing(models: ModelSet) -> None:
    engine, works = started(models, SEEDED, SamplingParams(max_tokens=40, ignore_eos=True), SEEDED)
    decoding = decoding_of(engine)
    columns = decoding._buffers.columns
    for column in columns:
        column.fill_(-7)
    shape = decoding.shape_of(works)
    assert shape == Shape(4, 512, None)
    rows = [Row(work.sequence, work.start, work.tokens[0], -1) for work in works]
    decoding._buffers.fill(0, rows, 4)
    for index, work in enumerate(works):
        sequence = work.sequence
        assert int(columns.token[index]) == sequence.tokens[-1]
        assert int(columns.position[index]) == work.start == sequence.num_tokens - 1
        assert int(columns.length[index]) == sequence.num_tokens
        pages = [page.row for page in sequence.table.pages]
        assert columns.pages[index, : len(pages)].tolist() == pages
        assert int(columns.write_row[index]) == pages[work.start // 16] + work.start % 16
        assert int(columns.draw[index]) == sequence.num_tokens - sequence.prompt_tokens
        params = sequence.sampling
        assert params is not None
        assert float(columns.temperature[index]) == params.temperature
        assert float(columns.top_p[index]) == params.top_p
        assert (int(columns.top_k[index]), float(columns.min_p[index])) == (params.top_k, params.min_p)
        assert int(columns.seed[index]) % (1 << 64) == sequence.seed
    assert columns.first_row[:5].tolist() == [0, 1, 2, 3, 3]
    padding = [int(getattr(columns, name)[3]) for name in ("write_row", "length", "source", "slot")]
    assert padding == [-1, 0, -1, -1]
    assert columns.pages[4].eq(-7).all()  # pages behind the batch do not travel


def test_a_row_is_written_anew_for_another_sequence_and_for_a_new_page(models: ModelSet) -> None:
    """The host's two buffers take turns, and each keeps what it wrote."""
    engine, _ = started(models, SEEDED, SamplingParams(max_tokens=40, ignore_eos=True))
    decoding = decoding_of(engine)
    columns = decoding._buffers.columns
    lane = engine.lanes[0]
    seen = set()
    for _ in range(30):
        works = engine.scheduler.schedule(lane)
        if len(works) < 2:
            break
        for order in (works, works[::-1], works):
            rows = [Row(work.sequence, work.start, work.tokens[0], -1) for work in order]
            decoding.run(Shape(2, 512, None), rows)
            for index, work in enumerate(order):
                pages = [page.row for page in work.sequence.table.pages]
                assert columns.pages[index, : len(pages)].tolist() == pages
                assert int(columns.seed[index]) % (1 << 64) == work.sequence.seed
                seen.add(len(pages))
        engine.step()
    assert len(seen) > 2


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.2}, {"logprobs": 0}, {"draft_tokens": 3}],
    ids=lambda params: next(iter(params)),
)
def test_what_the_device_cannot_choose_goes_another_way(models: ModelSet, params: dict[str, Any]) -> None:
    engine, works = started(
        models, SamplingParams(max_tokens=40, ignore_eos=True), SamplingParams(max_tokens=40, **params)
    )
    assert decoding_of(engine).shape_of(works) is None
    assert decoding_of(engine).shape_of(works[:1]) is not None
    assert engine.runner.run(engine.lanes[0], works).ids is None


def test_chunks_go_another_way_but_their_tokens_are_chosen_on_the_device(models: ModelSet) -> None:
    engine = engine_of(models)
    engine.submit_prompt(list(range(5, 30)), SEEDED)
    works = engine.scheduler.schedule(engine.lanes[0])
    assert decoding_of(engine).shape_of(works) is None
    assert engine.runner.run(engine.lanes[0], works).ids is not None


def test_rows_without_numbers_have_no_token_and_others_are_as_they_were() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = float("nan")
    rows = SamplingRows(
        torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64),
        torch.tensor([0, 0, 5], dtype=torch.int32),
        torch.ones(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([0, 1, -3]),
        torch.zeros(3, dtype=torch.int32),
        torch.tensor([0, 4, 9], dtype=torch.int32),
    )
    ids = sample_ids(logits, rows).tolist()
    assert ids[:2] == [int(logits[0].argmax()), -1]
    assert ids[2] in logits[2].topk(5).indices.tolist()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_what_chunks_need_is_launched_before_anything_is_asked(
    family: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile of attention, with contexts in one part and in many; the head, too."""
    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    monkeypatch.setenv(backend.VARIABLE, "triton")
    loaded = load_models(checkpoint(family), dtype=torch.bfloat16)
    mllm = loaded.models["mllm"]
    empty = LowRank(torch.zeros(BASE["intermediate_size"], 4), torch.zeros(4, BASE["hidden_size"]))
    mllm.backbone.adapters.append(AttachedAdapter("none", {(0, "down"): empty}, ()))
    engine = engine_of(with_models(loaded, probe=probe_on(mllm)))
    assert not launched
    engine.runner._cuda = True  # as on a GPU
    engine.runner._warm_up(engine.lanes[0], engine.models)
    attends = [launch.arguments for launch in launched if "BLOCK_M" in launch.arguments]
    tiles = {(some["BLOCK_M"], some["parts"] is None) for some in attends}
    assert tiles == {(rows, whole) for rows in (16, 64, 128) for whole in (True, False)}
    windows = mllm.backbone.decoder.config.windows
    assert {some["window"] for some in attends} == set(windows)
    names = {launch.kernel.fn.__name__ for launch in launched}
    assert {"_shrink", "_expand", "_pooled_head", "_rope_write", "_gated", "_add_rms_norm", "_merge"} <= names


def test_warming_up_writes_nothing_to_the_pool(models: ModelSet) -> None:
    engine = engine_of(models)
    mllm, before = models.models["mllm"], engine.pool.arena.clone()
    layout = mllm.layout(engine.pool.layouts[0].tokens_per_page)
    warm_up(mllm.backbone, layout, engine.pool.layers(layout), mllm.context, ())
    assert engine.pool.arena.equal(before)


class Recorded(NamedTuple):
    """What stands for a graph on a CPU: the step, done again."""

    replay: Callable[[], None]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes that were recorded; there is memory for five."""
    recorded: list[Shape] = []

    def record(decoding: Decoding, shape: Shape) -> Recorded:
        if len(recorded) == 5:
            raise torch.OutOfMemoryError("out of memory")
        recorded.append(shape)
        return Recorded(partial(decoding._compute, shape))

    monkeypatch.setattr(Decoding, "_recorded", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    return recorded


def test_graphs_are_recorded_for_a_while_and_then_as_batches_come(models: ModelSet, graphs: list[Shape]) -> None:
    engine, works = started(models, SEEDED)
    decoding = decoding_of(engine)
    decoding.capture(0.0)
    assert not graphs
    rows = [Row(work.sequence, work.start, work.tokens[0], -1) for work in works]
    shape = decoding.shape_of(works)
    assert shape is not None
    plain = decoding_of(started(models, SEEDED)[0]).run(shape, rows)
    decoding.ids.fill_(77)
    before = decoding.ids.clone()
    assert decoding.run(shape, rows).tolist() == plain.tolist()
    assert graphs == [shape] and decoding.ids[1:].equal(before[1:])  # what a batch under way chose is still there
    assert decoding.run(shape, rows).tolist() == plain.tolist() and len(graphs) == 1


def test_a_graph_too_many_is_an_error_at_first_and_done_without_later(models: ModelSet, graphs: list[Shape]) -> None:
    decoding = decoding_of(engine_of(models))
    with pytest.raises(DoesNotFit, match=r"after 5 graphs .* lower kv_bytes, or max_sequences, which is 128"):
        decoding.capture()
    assert graphs == decoding.shapes.all()[:5]
    engine, works = started(models, SEEDED)
    decoding = decoding_of(engine)
    decoding.capture(0.0)
    rows = [Row(work.sequence, work.start, work.tokens[0], -1) for work in works]
    shape = decoding.shape_of(works)
    assert shape is not None and shape not in graphs
    chosen = [decoding.run(shape, rows).tolist() for _ in range(2)]
    assert chosen[0] == chosen[1] and decoding._graphs == {shape: None}


@pytest.mark.parametrize("family", ["llama-biases", "gemma3", "granite"])
def test_a_graph_can_hold_a_step(
    family: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is read on the host, which fake tensors could not answer; sums and adapters included. Kernels are
    planned, with all their checks, and not run."""
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch.kernel))
    steps = {}
    for kernels in ("triton", "reference"):
        monkeypatch.setenv(backend.VARIABLE, kernels)
        loaded = load_models(checkpoint(family), dtype=torch.float32)
        mllm = loaded.models["mllm"]
        empty = LowRank(torch.zeros(BASE["intermediate_size"], 4), torch.zeros(4, BASE["hidden_size"]))
        mllm.backbone.adapters.append(AttachedAdapter("none", {(0, "down"): empty}, ()))
        steps[kernels] = decoding_of(engine_of(with_models(loaded, probe=probe_on(mllm))))
    shape = Shape(4, 512, pooled=2, adapted=True)
    assert shape in steps["triton"].shapes.all()
    with FakeTensorMode(allow_non_fake_inputs=True):
        steps["triton"]._compute(shape)
        with pytest.raises(DataDependentOutputException):
            steps["reference"]._compute(shape)
    layers, adapter, end = BASE["num_hidden_layers"], 2, 2
    norms = 2 if family == "gemma3" else 0
    # norm, rotation, attention and its merge, norm, gate
    assert len(launched) == (6 + norms) * layers + adapter + end
