"""How many replicas hold a latency objective under a guard, and what they cost: simulated, from what steps cost.

One replica is simulated with its part of the traffic, which a router is taken to hand out at random; a few replicas
behind a router that knows their load check that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf
from random import Random
from typing import NamedTuple

import numpy as np

from ..engine.errors import BadInput
from .cost_fit import Costs
from .guard_programs import DETECTOR, GUARDS, Asked, Sizes, models_of, stages
from .objective import Objective
from .replica import Job, Limits, Placement, Replica, simulate
from .traffic import Item, faster, rate_of

PLACEMENTS = ("same", "stream", "own", "cpu")
DETECTING = ("protector-separate",)  # guards with a detector that can be placed elsewhere
ROUTED = 4  # replicas behind one router in the check
FULL = 0.7  # busy part of a detector's own devices that is planned for
_PRECISION = 1.04
_HORIZON = 10  # times the objective that arrivals last at least: a queue that grows has time to show
_SETTLING = 0.1  # part of the requests, at the beginning and at the end, that nothing is concluded from


class CannotHold(BadInput):
    """No number of replicas holds the objective: a request alone takes longer."""


@dataclass(frozen=True)
class Traffic:
    """rate: requests a second in all. burst: how many arrive at once. trace: takes the place of both, and of the
    sizes, at `rate` where that is not None. prompt, answer: tokens of a question and an answer. harmful: part of the
    requests whose answer the guard mends."""

    rate: float | None = None
    burst: int = 1
    trace: tuple[Item, ...] = ()
    prompt: int = 64
    answer: int = 128
    images: int = 0
    harmful: float = 0.0

    def __post_init__(self) -> None:
        """Raises `BadInput` for what is no traffic."""
        if self.rate is None and not self.trace:
            raise BadInput("give a rate, or a trace of at least one request")
        if self.rate is not None and not 0 < self.rate < inf:
            raise BadInput(f"a rate is above 0, not {self.rate}")
        if self.burst < 1 or self.prompt < 1 or self.answer < 2 or self.images < 0:
            raise BadInput(
                "a burst and a prompt are at least 1, an answer at least 2 tokens, images at least 0, not "
                f"{self.burst}, {self.prompt}, {self.answer} and {self.images}"
            )
        if not 0.0 <= self.harmful <= 1.0:
            raise BadInput(f"harmful is a part from 0 to 1, not {self.harmful}")

    @property
    def requests_per_second(self) -> float:
        if self.rate is not None:
            return self.rate
        rate = rate_of(list(self.trace))
        if not rate > 0:
            raise BadInput("the trace's requests arrive all at once: give a rate for them")
        return rate

    @property
    def most_share(self) -> float:
        """How much of the traffic can be asked of one replica: more than all of it only where it has no pattern."""
        return 1.0 if self.trace or self.burst > 1 else inf

    def asked(self, share: float, count: int, seed: int) -> Iterator[Asked]:
        """`count` requests, each of which comes here with probability `share`; a trace is repeated as often as is
        necessary, every time with another choice."""
        random = np.random.default_rng(seed)
        coins = Random(seed)
        if self.trace:
            yield from self._traced(share, count, random, coins)
            return
        for arrival in self._arrivals(share, count, random):
            harmful = coins.random() < self.harmful
            yield Asked(arrival, self.prompt, self.answer, self.images, harmful)

    def _arrivals(self, share: float, count: int, random: np.random.Generator) -> Iterator[float]:
        rate = self.requests_per_second
        if self.burst == 1:
            yield from np.cumsum(random.exponential(1.0 / (rate * share), count)).tolist()
            return
        none = (1.0 - share) ** self.burst  # bursts of which nothing comes here
        given, now = 0, 0.0
        while given < count:
            now += random.exponential(self.burst / rate / (1.0 - none))
            here = 0
            while not here:
                here = int(random.binomial(self.burst, share))
            for _ in range(min(here, count - given)):
                yield now
            given += here

    def _traced(self, share: float, count: int, random: np.random.Generator, coins: Random) -> Iterator[Asked]:
        items = faster(list(self.trace), self.requests_per_second / (rate_of(list(self.trace)) or 1.0))
        length = len(items) / self.requests_per_second
        given, begin = 0, 0.0
        while given < count:
            chosen = np.flatnonzero(random.random(len(items)) < share)[: count - given]
            for index in chosen.tolist():
                item = items[index]
                harmful = item.harmful or coins.random() < self.harmful
                yield Asked(begin + item.arrival, item.prompt_tokens, item.answer_tokens, item.images, harmful)
            given += len(chosen)
            begin += length


class Seen(NamedTuple):
    """What users of one replica see, in seconds. met: part of the requests within the objective. busy: part of the
    time, by device. decoding: answers in a step, in the mean of the time. preempted: sequences, of all requests."""

    ttft: np.ndarray
    itl: np.ndarray
    e2e: np.ndarray
    met: float
    busy: tuple[float, ...]
    under_way: float
    preempted: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides a replica's latencies but the traffic's size."""

    costs: Costs
    limits: Limits
    sizes: Sizes
    traffic: Traffic
    objective: Objective
    target: float = 0.95
    requests: int = 800
    seed: int = 0

    def alone(self, guard: str, placement: Placement, harmful: bool) -> Job:
        """One request on an idle replica."""
        items = self.traffic.trace
        longest = max(items, key=lambda item: item.answer_tokens) if items else None
        asked = Asked(0.0, self.traffic.prompt, self.traffic.answer, self.traffic.images, harmful)
        if longest is not None:
            asked = Asked(0.0, longest.prompt_tokens, longest.answer_tokens, longest.images, harmful)
        return simulate([self._replica(guard, placement)], [Job(0, asked, stages(guard, asked, self.sizes))])[0]

    def run(self, guard: str, placement: Placement, share: float, replicas: int = 1) -> Seen:
        """Simulate `replicas` behind one router, each with `share` of the traffic."""
        some = [self._replica(guard, placement) for _ in range(replicas)]
        return _seen(some, simulate(some, self._jobs(guard, share, replicas)[0]), guard, self.objective)

    def holds(self, guard: str, placement: Placement, share: float) -> bool:
        """Whether a replica with this share of the traffic holds the objective."""
        jobs, count = self._jobs(guard, share, 1)
        edge = int(_SETTLING * count)
        missed, allowed = 0, (1.0 - self.target) * (count - 2 * edge)

        def hopeless(job: Job) -> bool:
            nonlocal missed
            missed += edge <= job.number < count - edge and not self.objective.met(*latency(job, guard))
            return missed > allowed

        replica = self._replica(guard, placement)
        done = simulate([replica], jobs, hopeless=hopeless)
        return not any(hopeless(job) for job in replica.finished) and len(done) == count

    def _jobs(self, guard: str, share: float, replicas: int) -> tuple[Iterator[Job], int]:
        rate = self.traffic.requests_per_second * share * replicas
        bound = max(value or 0.0 for value in (self.objective.ttft, self.objective.e2e))
        count = min(max(self.requests, ceil(_HORIZON * bound * rate)), 20 * self.requests)
        asked = self.traffic.asked(min(share * replicas, self.traffic.most_share), count, self.seed)
        return (Job(number, one, stages(guard, one, self.sizes)) for number, one in enumerate(asked)), count

    def _replica(self, guard: str, placement: Placement) -> Replica:
        harmful = self.traffic.harmful > 0 or any(item.harmful for item in self.traffic.trace)
        return Replica(self.costs, models_of(guard, harmful), self.limits, placement)


def _seen(replicas: Sequence[Replica], jobs: Sequence[Job], guard: str, objective: Objective) -> Seen:
    edge = int(_SETTLING * len(jobs))
    some = jobs[edge : len(jobs) - edge] or jobs
    rows = [latency(job, guard) for job in some]
    ttft, itl, e2e = (np.array(column) for column in zip(*rows, strict=True))
    end = max(replica.now for replica in replicas)
    each = [[device.busy / end for device in replica.devices] for replica in replicas]
    return Seen(
        ttft,
        itl,
        e2e,
        sum(objective.met(*row) for row in rows) / len(rows),
        tuple(np.mean(each, axis=0).tolist()),
        sum(replica.waited for replica in replicas) / end / len(replicas),
        sum(replica.preemptions for replica in replicas),
    )


def latency(job: Job, guard: str) -> tuple[float, float, float]:
    """Seconds of a finished job: until text is shown, between two tokens of its answer in the mean, until the reply.

    Under a guard text is shown once it is cleared.
    """
    assert job.first is not None and job.decoded is not None and job.finished is not None
    shown = job.first if guard == "off" else job.finished
    begin = job.asked.arrival
    return shown - begin, (job.decoded - job.first) / (job.asked.answer - 1), job.finished - begin


@dataclass(frozen=True)
class Found:
    """What one guard in one placement needs. share: of the traffic that one replica can take at most. alone: seconds
    of a harmless reply on an idle replica. detectors: devices of their own that detectors need. routed: p95 of the
    whole reply behind a router that knows the replicas' load."""

    guard: str
    placement: str
    share: float
    replicas: int
    detectors: int
    alone: float
    alone_harmful: float
    seen: Seen
    routed: float

    @property
    def devices(self) -> int:
        return self.replicas + self.detectors


def find(plan: Plan, guard: str, placement: Placement) -> Found:
    """The fewest replicas that hold the objective. Raises `CannotHold`, and `BadInput` for a guard that is none."""
    paths = [plan.alone(guard, placement, harmful) for harmful in (False, True)]
    alone, mended = (latency(job, guard) for job in paths)
    wanted = plan.target
    harmful = plan.traffic.harmful
    if not plan.objective.met(*alone) and 1.0 - harmful >= 1.0 - wanted:
        raise CannotHold(
            f"{guard}: a request alone takes {alone[2]:.3g} s to its end, {alone[0]:.3g} s to its first text and "
            f"{1e3 * alone[1]:.3g} ms a token; the objective is {plan.objective}"
        )
    if not plan.objective.met(*mended) and harmful > 1.0 - wanted:
        raise CannotHold(
            f"{guard}: a harmful request alone takes {mended[2]:.3g} s, which is {100 * harmful:.3g} % of them; the "
            f"objective is {plan.objective} for {100 * wanted:.3g} %"
        )
    share = _largest_share(plan, guard, placement, 1.0 / (plan.traffic.requests_per_second * alone[2]))
    replicas = max(1, ceil(1.0 / share - 1e-9))
    seen = plan.run(guard, placement, 1.0 / replicas)
    while seen.met < wanted and replicas < 1 << 20:  # the share was found to a few percent
        replicas = max(replicas + 1, ceil(replicas * 1.02))
        seen = plan.run(guard, placement, 1.0 / replicas)
    together = min(ROUTED, replicas)
    routed = plan.run(guard, placement, 1.0 / replicas, together)
    detectors = 0
    if placement.apart and DETECTOR in models_of(guard, harmful > 0):
        detectors = max(1, ceil(replicas * seen.busy[-1] / FULL))
    return Found(
        guard,
        placement.name,
        share,
        replicas,
        detectors,
        alone[2],
        mended[2],
        seen,
        float(np.percentile(routed.e2e, 95)),
    )


def _largest_share(plan: Plan, guard: str, placement: Placement, first: float) -> float:
    """Of the traffic that one replica holds the objective with, to a few percent."""

    def holds(share: float) -> bool:
        return plan.holds(guard, placement, share)

    most = plan.traffic.most_share
    low = high = min(first, most)
    if holds(low):
        while holds(high):
            low = high
            if high >= most:
                return low
            high = min(2.0 * high, most)
    else:
        while not holds(low):
            high, low = low, low / 2.0
            if low < 1e-7:
                raise CannotHold(f"{guard}: 10 million replicas would not hold {plan.objective}")
    while high / low > _PRECISION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def placement_named(name: str, outside: tuple[float, float] | None = None, workers: int = 1) -> Placement:
    """same: all lanes in turn on one device. stream: at the same time on one device. own: the detector on devices of
    its own. cpu: the exported detector on processor cores; outside: its seconds of a chunk and of a token.

    Raises `BadInput` for another name, and for `cpu` without its seconds.
    """
    if name == "cpu":
        if outside is None:
            raise BadInput(
                "placement cpu needs what the exported detector costs there: give --onnx FILE of bench onnx"
            )
        return Placement("cpu", outside=outside, workers=workers)
    if name not in PLACEMENTS:
        raise BadInput(f"no placement {name!r}; there are {', '.join(PLACEMENTS)}")
    return Placement(name, overlapped=name == "stream", apart=name == "own")


def run_capacity(
    plan: Plan,
    guards: Sequence[str],
    placements: Sequence[Placement],
    told: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[tuple[str, str], Found], dict[tuple[str, str], str]]:
    """No guard, and every guard in every placement that makes a difference to it: what each needs, and why the others
    cannot hold the objective, by guard and placement. Raises `BadInput` for a guard that is none."""
    if unknown := [name for name in guards if name not in GUARDS]:
        raise BadInput(f"no guard {unknown[0]!r} to simulate; there are {', '.join(GUARDS)}")
    same = Placement()
    due = [("off", same)]
    for guard in dict.fromkeys(guards):
        some = [one for one in placements if guard in DETECTING or one.name == "same"] or [same]
        due += [(guard, one) for one in some if guard != "off"]
    found: dict[tuple[str, str], Found] = {}
    refused: dict[tuple[str, str], str] = {}
    for number, (guard, placement) in enumerate(due, 1):
        try:
            found[guard, placement.name] = find(plan, guard, placement)
        except CannotHold as error:
            refused[guard, placement.name] = str(error)
        if told is not None:
            told("simulating", number, len(due))
    return found, refused
