"""What guards cost on paper: latencies predicted from shapes, bandwidth and FLOP/s.

A model of the work that cannot be avoided, not a measurement: nothing of the engine runs here.

The roofline is Williams, Waterman and Patterson's (CACM 52(4), 2009): work takes as long as its bytes or its floating
point operations do, whichever is longer. Bytes and operations of a transformer are counted as by Pope et al.
(arXiv 2211.05102): weights are read once a pass, keys and values once for each sequence; two operations a weight
and row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ..engine.errors import BadInput
from ..engine.models.decoder import DecoderConfig
from .decode import read_bandwidth

JUDGE_TEMPLATE = 35  # tokens of ECSO's judge prompt around question and answer
VARIANTS = ("protector-separate", "protector-adapter", "probe", "ecso", "ecso-continued")


@dataclass(frozen=True)
class Work:
    """Bytes moved, floating point operations, and passes through a model; works add up."""

    bytes: float = 0.0
    flops: float = 0.0
    passes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.passes + other.passes)

    def times(self, count: int) -> Work:
        return Work(self.bytes * count, self.flops * count, self.passes * count)


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes/s. flops: FLOP/s of a matrix product in the weights' dtype. The efficiencies are the parts of
    them that are reached, pass_overhead the seconds a pass costs whatever it does. lanes_overlap: passes of two
    models run at the same time and share both; else one after the other."""

    name: str
    bandwidth: float
    flops: float
    memory_efficiency: float = 1.0
    compute_efficiency: float = 1.0
    pass_overhead: float = 0.0
    lanes_overlap: bool = False

    def __post_init__(self) -> None:
        """Raises `BadInput` for rates and efficiencies that are not above zero, or an overhead below it."""
        for name in ("bandwidth", "flops", "memory_efficiency", "compute_efficiency"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.pass_overhead >= 0:
            raise BadInput(f"pass_overhead must be at least 0 seconds, not {self.pass_overhead}")

    @property
    def ridge(self) -> float:
        """Operations a byte from which on work is bound by computing."""
        return self.flops * self.compute_efficiency / (self.bandwidth * self.memory_efficiency)

    def seconds(self, work: Work) -> float:
        moved = work.bytes / (self.bandwidth * self.memory_efficiency)
        computed = work.flops / (self.flops * self.compute_efficiency)
        return max(moved, computed) + work.passes * self.pass_overhead

    def beside(self, decoding: Work, guard: Work) -> float:
        """Seconds that another model's work adds to the decoding it runs beside.

        Where lanes overlap, this assumes that it is spread evenly over the steps.
        """
        if self.lanes_overlap:
            return self.seconds(decoding + guard) - self.seconds(decoding)
        return self.seconds(guard)


def h200() -> Machine:
    """NVIDIA H200: 4.3 TB/s is what copies reach of its 4.8, 790 TFLOP/s what dense bf16 products do of its 989."""
    return Machine("h200", 4.3e12, 790e12, lanes_overlap=True)


def this_cpu(dtype: torch.dtype) -> Machine:
    """This machine's cores, measured now: a large buffer's reading, and a product of 1024 x 2048 x 2048."""
    return Machine("cpu", read_bandwidth(torch.device("cpu")), matmul_flops(dtype))


def matmul_flops(
    dtype: torch.dtype, rows: int = 1024, size: int = 2048, repeats: int = 9, device: torch.device | None = None
) -> float:
    """FLOP/s of [rows, size] x [size, size]; the best run after one that warms up. device: None is the CPU."""
    x = torch.ones(rows, size, dtype=dtype, device=device)
    weight = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(repeats + 1):
        began = perf_counter()
        float(torch.nn.functional.linear(x, weight)[0, 0])  # waits for a device
        times.append(perf_counter() - began)
    return 2.0 * rows * size * size / min(times[1:])


@dataclass(frozen=True)
class Shape:
    """What of a decoder costs time; names as in `DecoderConfig`. weight_bytes: of one number."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    weight_bytes: int = 2

    @classmethod
    def of(cls, config: DecoderConfig, weight_bytes: int = 2) -> Shape:
        return cls(
            config.layers,
            config.hidden_size,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.ffn_size,
            config.vocab_size,
            weight_bytes,
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's matrices: queries, keys, values, output, gate, up, down."""
        own, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, ffn = self.hidden, self.ffn
        attention = ((hidden, own), (hidden, shared), (hidden, shared), (own, hidden))
        return (*attention, (hidden, ffn), (hidden, ffn), (ffn, hidden))

    @property
    def layer_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.weight_bytes

    def rows(self, rows: int, context: int = 0, batch: int = 1) -> Work:
        """What `rows` new tokens of each of `batch` sequences, after `context` known ones, add to a pass that reads
        the weights anyway."""
        attention = 4.0 * self.heads * self.head_dim * (context + (rows + 1) / 2)
        flops = batch * rows * self.layers * (2.0 * self.layer_weights + attention)
        known = context + rows if rows else 0
        return Work(float(batch * known * self.layers * self.kv_bytes), flops)

    def forward(self, rows: int, context: int = 0, batch: int = 1, logits: int = 0) -> Work:
        """One pass; see `rows`. `logits` of the rows are multiplied with the output matrix. No rows, no layers or
        no sequences are no work."""
        if not rows * batch * self.layers:
            return Work()
        head = self.vocab * self.hidden if logits else 0
        weights = (self.layers * self.layer_weights + head) * self.weight_bytes
        return Work(float(weights), 2.0 * batch * head * logits, 1) + self.rows(rows, context, batch)

    def low_rank(self, rank: int, rows: int) -> Work:
        """What an adapter of all matrices adds to a pass for `rows` of its rows."""
        if not rank * rows:
            return Work()
        weights = self.layers * rank * sum(rows + columns for rows, columns in self.linears)
        return Work(float(weights * self.weight_bytes), 2.0 * weights * rows)


class Eyes(NamedTuple):
    """A vision tower. patches: tokens inside it. tokens: those that it makes of an image."""

    patches: int
    layers: int
    hidden: int
    ffn: int
    tokens: int

    def encode(self, images: int) -> Work:
        weights = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)
        attention = 4.0 * self.patches**2 * self.hidden * self.layers
        return Work(2.0 * weights, images * (2.0 * weights * self.patches + attention), 1)


@dataclass(frozen=True)
class Setup:
    """Who answers and who guards. question, answer: tokens. chunk: the detector's, while it screens. batch: requests
    at the same time, in step. detector: None is one as large and as deep as the model. rank, invocation: of the
    activated adapter. probe_layer: None is the middle."""

    model: Shape
    detector: Shape | None = None
    eyes: Eyes | None = None
    question: int = 64
    answer: int = 128
    chunk: int = 32
    batch: int = 1
    rank: int = 16
    invocation: int = 4
    probe_layer: int | None = None

    def __post_init__(self) -> None:
        """Raises `BadInput` for counts below one, or a probe's layer that the model does not have."""
        for name in ("question", "answer", "chunk", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.probe_layer is not None and not 0 <= self.probe_layer <= self.model.layers:
            raise BadInput(f"probe_layer must be from 0 to {self.model.layers}, not {self.probe_layer}")

    @property
    def image_tokens(self) -> int:
        return self.eyes.tokens if self.eyes else 0

    @property
    def prompt(self) -> int:
        return self.image_tokens + self.question

    def vision(self) -> Work:
        return self.eyes.encode(self.batch) if self.eyes else Work()

    def step(self, number: int) -> Work:
        """The decode step that follows the answer's token `number`, counted from 1."""
        return self.model.forward(1, self.prompt + number - 1, self.batch, logits=1)


class Cost(NamedTuple):
    """Seconds that a guard adds to a harmless reply; exposed: after the answer's last token. published: what the
    published pipeline's own pass would add on the same machine."""

    added: float
    exposed: float
    published: float


@dataclass(frozen=True)
class Prediction:
    """Seconds on one machine. step: the middle decode step. costs: by variant."""

    machine: Machine
    setup: Setup
    prefill: float
    step: float
    reply: float
    costs: dict[str, Cost]

    def percent(self, seconds: float) -> float:
        return 100.0 * seconds / self.reply

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": asdict(self.machine),
            "setup": asdict(self.setup),
            "prefill_ms": round(1e3 * self.prefill, 4),
            "step_ms": round(1e3 * self.step, 4),
            "reply_ms": round(1e3 * self.reply, 4),
            "variants": {
                name: {
                    "added_ms": round(1e3 * cost.added, 4),
                    "added_percent": round(self.percent(cost.added), 3),
                    "exposed_ms": round(1e3 * cost.exposed, 4),
                    "exposed_percent": round(self.percent(cost.exposed), 3),
                    "published_added_ms": round(1e3 * cost.published, 4),
                    "published_added_percent": round(self.percent(cost.published), 3),
                }
                for name, cost in self.costs.items()
            },
        }


def predict(setup: Setup, machine: Machine) -> Prediction:
    """The reply without a guard, and what each variant adds to it on the harmless path."""
    model, batch = setup.model, setup.batch
    first = machine.seconds(setup.vision()) + machine.seconds(model.forward(setup.prompt, 0, batch, logits=1))
    steps = [machine.seconds(setup.step(number)) for number in range(1, setup.answer)]
    detector_pass = machine.seconds((setup.detector or model).forward(setup.answer, 0, batch))
    judge = _published_judge(setup, machine)
    return Prediction(
        machine,
        setup,
        prefill=first,
        step=machine.seconds(setup.step(max(1, setup.answer // 2))),
        reply=first + sum(steps),
        costs={
            "protector-separate": Cost(*_separate(setup, machine), detector_pass),
            "protector-adapter": Cost(*_adapter(setup, machine), detector_pass),
            "probe": Cost(*_probe(setup, machine), detector_pass),
            "ecso": Cost(*_judge(setup, machine, JUDGE_TEMPLATE + setup.question + setup.answer), judge),
            "ecso-continued": Cost(*_judge(setup, machine, JUDGE_TEMPLATE + 1), judge),
        },
    )


def _separate(setup: Setup, machine: Machine) -> tuple[float, float]:
    """(added, exposed): a detector of its own reads `chunk` tokens at a time, the last ones after the answer."""
    detector = setup.detector or setup.model
    hidden = 0.0
    full = (setup.answer - 1) // setup.chunk
    for number in range(full):
        first = number * setup.chunk
        window = Work()  # the decode steps in which the chunk's tokens come
        for token in range(first + 1, first + setup.chunk + 1):
            window += setup.step(token)
        hidden += machine.beside(window, detector.forward(setup.chunk, first, setup.batch))
    done = full * setup.chunk
    exposed = machine.seconds(detector.forward(setup.answer - done, done, setup.batch))
    return hidden + exposed, exposed


def _adapter(setup: Setup, machine: Machine) -> tuple[float, float]:
    """An activated adapter on the model itself: its few rows ride in a decode step a chunk; the last ones, with the
    row of the last answer token, are a pass of their own."""
    model, rows = setup.model, setup.invocation
    updates = model.low_rank(setup.rank, rows * setup.batch)
    hidden = 0.0
    for token in range(setup.chunk, setup.answer, setup.chunk):
        riders = model.rows(rows, setup.prompt + token, setup.batch) + updates
        hidden += machine.seconds(setup.step(token) + riders) - machine.seconds(setup.step(token))
    last = model.forward(rows + 1, setup.prompt + setup.answer - 1, setup.batch)
    exposed = machine.seconds(last + updates)
    return hidden + exposed, exposed


def _probe(setup: Setup, machine: Machine) -> tuple[float, float]:
    """A running sum of hidden states in every step (one read, one sum read and written in fp32), and the row of the
    last answer token through the layers below the probe."""
    layer = setup.model.layers // 2 if setup.probe_layer is None else setup.probe_layer
    hidden_size = setup.model.hidden * setup.batch
    adding = Work(hidden_size * (setup.model.weight_bytes + 8.0), float(hidden_size)) if layer else Work()
    hidden = 0.0
    for token in range(1, setup.answer):
        step = setup.step(token)
        hidden += machine.seconds(step + adding) - machine.seconds(step)
    closing = replace(setup.model, layers=layer).forward(1, setup.prompt + setup.answer - 1, setup.batch)
    exposed = machine.seconds(closing + adding)
    return hidden + exposed, exposed


def _judge(setup: Setup, machine: Machine, rows: int) -> tuple[float, float]:
    """ECSO's judge reads `rows` tokens after what it finds of the answer's pages, and one row's distribution."""
    context = max(0, setup.prompt + setup.answer + JUDGE_TEMPLATE - rows)
    seconds = machine.seconds(setup.model.forward(rows, context, setup.batch, logits=1))
    return seconds, seconds


def _published_judge(setup: Setup, machine: Machine) -> float:
    """As released: the image is encoded again, the whole prompt read again, a word and the end token decoded."""
    prompt = setup.prompt + setup.answer + JUDGE_TEMPLATE
    reading = setup.model.forward(prompt, 0, setup.batch, logits=1)
    word = setup.model.forward(1, prompt, setup.batch, logits=1)
    return machine.seconds(setup.vision()) + machine.seconds(reading) + machine.seconds(word)
