"""One engine's step loop without an engine: which rows are in which step follows the scheduler's rules, and how long
a step takes a model of its costs. Time is simulated; nothing is computed.

A discrete-event simulation: the events are arrivals and the ends of batches.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from ..engine.answers import EAGER, PATIENT
from ..engine.errors import DoesNotFit
from .cost_fit import Costs, Demand, StepLoad
from .guard_programs import DETECTOR, MLLM, Asked, Stage

Order = tuple[int, int, int]


@dataclass(frozen=True)
class Limits:
    """Of one engine, as `Engine` has them. kv_tokens: that the page pool holds; None: as many as are wanted."""

    budget: int = 512
    max_sequences: int = 128
    free_rows: int = 16
    page: int = 64
    kv_tokens: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where the detector's lane runs. overlapped: lanes of one device run at the same time and share it, else one
    after the other. apart: the detector has a device of its own. outside: seconds of (a chunk, a token of it) of a
    detector on `workers` processor cores; None: it runs in a lane."""

    name: str = "same"
    overlapped: bool = False
    apart: bool = False
    outside: tuple[float, float] | None = None
    workers: int = 1


@dataclass(eq=False, slots=True)
class Job:
    """A request under way. Times are None until they come: `first` token of its answer, answer `decoded`, all over
    (`finished`)."""

    number: int
    asked: Asked
    stages: tuple[Stage, ...]
    stage: int = -1
    first: float | None = None
    decoded: float | None = None
    finished: float | None = None
    preemptions: int = 0


@dataclass(eq=False, slots=True)
class Stream:
    """A sequence. todo: known tokens that are not computed; done: computed ones; new: tokens to decode after the next
    sampled one. judging: its rows are a guard's. ends: number of the lane's step that decodes its last token."""

    job: Job
    order: Order
    stage: Stage
    todo: int
    done: int
    new: int
    images: int
    judging: bool
    ends: int = 0
    began: int = 0
    fed: int = 0
    screen: Stream | None = None  # the detector that reads it
    of: Stream | None = None  # the answer that it reads
    closed: bool = False
    closing: bool = False
    admitted: bool = False


class Batch(NamedTuple):
    """What a lane computes now: all of its decoding sequences, and chunks."""

    lane: Lane
    load: StepLoad
    chunks: list[tuple[Stream, int]]


@dataclass(eq=False)
class Lane:
    """A backbone's queue; see `engine/scheduler.py`, whose rules these are."""

    name: str
    limits: Limits
    waiting: list[tuple[Order, Stream]] = field(default_factory=list)
    chunked: list[tuple[Order, Stream]] = field(default_factory=list)
    decoding: dict[int, Stream] = field(default_factory=dict)  # by id
    ends: list[tuple[int, Order, Stream]] = field(default_factory=list)
    screened: dict[int, Stream] = field(default_factory=dict)  # decoding, with a detector that reads along
    read: int = 0  # tokens of all decoding sequences
    steps: int = 0
    held: int = 0  # sequences that hold pages
    spare: int = 0
    look_at: int = 0  # the step from which on a detector may have enough to read

    def add(self, stream: Stream) -> None:
        heapq.heappush(self.waiting, (stream.order, stream))

    def resume(self, stream: Stream) -> None:
        """It holds pages already, and has something to compute again."""
        insort(self.chunked, (stream.order, stream), key=lambda item: item[0])


@dataclass(eq=False)
class Device:
    """Runs one batch at a time, or with `overlapped` one of every lane, which then share memory and arithmetic."""

    lanes: list[Lane]
    overlapped: bool = False
    running: list[tuple[Batch, Demand]] = field(default_factory=list)
    left: list[float] = field(default_factory=list)  # seconds of each, alone
    next_lane: int = 0
    busy: float = 0.0

    @property
    def slowdown(self) -> float:
        """How much longer than alone each batch takes: the resource that is asked for most decides."""
        if len(self.running) < 2:
            return 1.0
        demands = [demand for _, demand in self.running if demand.seconds > 0]
        memory = sum(demand.memory / demand.seconds for demand in demands)
        return max(1.0, memory, sum(demand.compute / demand.seconds for demand in demands))

    @property
    def next_end(self) -> float:
        """Seconds from now until a batch ends."""
        return min(self.left) * self.slowdown if self.left else inf

    def advance(self, seconds: float) -> None:
        if self.left:
            self.busy += seconds
            rate = 1.0 / self.slowdown
            self.left = [left - seconds * rate for left in self.left]


class Replica:
    """A simulated engine. Feed it with `submit`, and let it run to `next_event` with `advance`.

    It begins no batch before it is asked to `start`. Raises `LaneNotMeasured` for a model
    whose lane `costs` does not know.
    """

    def __init__(self, costs: Costs, models: Iterable[str], limits: Limits, placement: Placement) -> None:
        self.costs, self.limits, self.placement = costs, limits, placement
        self.now = 0.0
        lanes: dict[str, Lane] = {}
        self._lane_of: dict[str, Lane] = {}
        for model in sorted(models, key=(MLLM, "detoxifier", DETECTOR).index):
            if model == DETECTOR and placement.outside is not None:
                continue
            # a detector with a device of its own leaves the batch it might have shared
            name = costs.lane(model)
            key = f"{name} apart" if model == DETECTOR and placement.apart else name
            self._lane_of[model] = lanes.setdefault(key, Lane(name, limits))
        apart = [lane for key, lane in lanes.items() if key.endswith(" apart")]
        here = [lane for key, lane in lanes.items() if not key.endswith(" apart")]
        self.devices = [Device(here, placement.overlapped), *(Device([lane]) for lane in apart)]
        self.under_way = 0
        self.waited = 0.0  # seconds of all requests together
        self.finished: list[Job] = []
        self.preemptions = 0
        self.batches = 0
        self.kv = 0  # tokens held, a half page a sequence included
        self._outside: list[tuple[float, int, Stream]] = []  # (ends, number, stream)
        self._queue: list[Stream] = []
        self._asked_outside = 0

    # From without.

    def submit(self, job: Job) -> None:
        """Raises `DoesNotFit` where a pass of it could not run even alone."""
        most = max(stage.known + stage.prompt + stage.new for stage in job.stages)
        if self.limits.kv_tokens is not None and most + self.limits.page > self.limits.kv_tokens:
            raise DoesNotFit(
                f"a request with a pass of {most:,} tokens needs more than the whole page pool, which holds "
                f"{self.limits.kv_tokens:,}"
            )
        self.under_way += 1
        self._next_stage(job)

    @property
    def next_event(self) -> float:
        """When something ends; infinity where nothing runs."""
        soonest = min(device.next_end for device in self.devices)
        outside = self._outside[0][0] if self._outside else inf
        return min(self.now + soonest, outside)

    def start(self) -> None:
        """Begin batches wherever a device has room and a lane has work."""
        for device in self.devices:
            if device.overlapped:
                busy = {id(batch.lane) for batch, _ in device.running}
                for lane in device.lanes:
                    if id(lane) not in busy:
                        self._begin(device, lane)
            elif not device.running:
                for turn in range(len(device.lanes)):
                    number = (device.next_lane + turn) % len(device.lanes)
                    if self._begin(device, device.lanes[number]):
                        device.next_lane = (number + 1) % len(device.lanes)
                        break

    def advance(self, to: float) -> None:
        """Let time pass until `to`, at most the next event, and take what ends then."""
        seconds = to - self.now
        self.waited += seconds * self.under_way
        ended: list[Batch] = []
        for device in self.devices:
            device.advance(seconds)
            for index in range(len(device.running) - 1, -1, -1):
                if device.left[index] <= 1e-9:
                    ended.append(device.running.pop(index)[0])
                    device.left.pop(index)
        self.now = to
        for batch in ended:
            self._end(batch)
        while self._outside and self._outside[0][0] <= to + 1e-12:
            _, _, stream = heapq.heappop(self._outside)
            stream.todo = 0
            self._read(stream)
        self._start_outside()

    # Batches.

    def _begin(self, device: Device, lane: Lane) -> bool:
        batch = self._schedule(lane)
        if batch is None:
            return False
        demand = self.costs.demand(lane.name, batch.load)
        device.running.append((batch, demand))
        device.left.append(demand.seconds)
        self.batches += 1
        return True

    def _schedule(self, lane: Lane) -> Batch | None:
        """Decoding sequences, then chunks, then newcomers, oldest first, within the budget and the pages."""
        limits = self.limits
        budget = max(limits.budget, limits.max_sequences) - len(lane.decoding)
        chunks: list[tuple[Stream, int]] = []
        for _, stream in lane.chunked:
            if not budget:
                break
            count = min(stream.todo, budget)
            chunks.append((stream, count))
            budget -= count
        while budget and lane.waiting and lane.held < limits.max_sequences:
            stream = lane.waiting[0][1]
            needed = stream.done + stream.todo + limits.page // 2
            if limits.kv_tokens is not None and self.kv + needed > limits.kv_tokens and self.kv:
                break
            heapq.heappop(lane.waiting)
            lane.resume(stream)
            stream.admitted = True
            lane.held += 1
            self.kv += needed
            count = min(stream.todo, budget)
            chunks.append((stream, count))
            budget -= count
        decode = len(lane.decoding)
        if not decode and not chunks:
            return None
        lane.spare = limits.free_rows - decode
        prefill = guard = pairs = images = 0
        for stream, count in chunks:
            pairs += count * (stream.done + (count + 1) // 2)
            images, stream.images = images + stream.images, 0
            if stream.judging or stream.closing:
                guard += count
            else:
                prefill += count
        return Batch(lane, StepLoad(decode, prefill, guard, lane.read + decode, pairs, images), chunks)

    def _end(self, batch: Batch) -> None:
        lane = batch.lane
        decode = len(lane.decoding) if batch.load.decode else 0  # without those that were preempted meanwhile
        if batch.load.decode:
            lane.steps += 1
            lane.read += decode
            self.kv += decode
        computed = []
        for stream, count in batch.chunks:
            if not stream.admitted:  # preempted meanwhile
                continue
            stream.todo -= count
            stream.done += count
            if not stream.todo:
                computed.append(stream)
        if computed:
            lane.chunked = [item for item in lane.chunked if item[1].todo]
        for stream in computed:
            self._computed(lane, stream)
        while lane.ends and lane.ends[0][0] <= lane.steps:
            _, _, stream = heapq.heappop(lane.ends)
            if lane.decoding.get(id(stream)) is stream:
                self._leave_decoding(lane, stream)
                self._decoded(lane, stream)
        if lane.screened and lane.steps >= lane.look_at:
            left = [self._feed_if_worth(lane, stream, decode) for stream in lane.screened.values()]
            lane.look_at = lane.steps + max(1, self._least_chunk(lane) - max(left))
        self._preempt()

    def _computed(self, lane: Lane, stream: Stream) -> None:
        """All its known tokens are computed."""
        if stream.of is not None:
            self._read(stream)
        elif stream.closing or not stream.stage.new:
            self._release(lane, stream)
            self._over(stream.job)
        else:
            if stream.job.first is None:
                stream.job.first = self.now
            stream.new -= 1
            if not stream.new:
                self._decoded(lane, stream)
                return
            stream.began, stream.ends = lane.steps, lane.steps + stream.new
            lane.decoding[id(stream)] = stream
            lane.read += stream.done
            heapq.heappush(lane.ends, (stream.ends, stream.order, stream))
            if stream.stage.screen:
                lane.screened[id(stream)] = stream
                lane.look_at = min(lane.look_at, lane.steps + self._least_chunk(lane) - 1)

    def _leave_decoding(self, lane: Lane, stream: Stream) -> None:
        del lane.decoding[id(stream)]
        lane.screened.pop(id(stream), None)
        decoded = lane.steps - stream.began
        stream.done += decoded
        stream.new -= decoded
        lane.read -= stream.done

    def _decoded(self, lane: Lane, stream: Stream) -> None:
        """Its last token is sampled."""
        job, stage = stream.job, stream.stage
        if job.decoded is None:
            job.decoded = self.now
        if stage.tap:
            stream.closing, stream.todo = True, 1
            self.kv += 1
            lane.resume(stream)
            return
        self._release(lane, stream)
        if not stage.screen:
            self._over(job)
            return
        self._feed(stream, stage.new - stream.fed)
        screen = stream.screen
        assert screen is not None
        screen.closed = True
        if not screen.todo and screen not in self._queue:
            self._read(screen)

    # Screens.

    def _least_chunk(self, lane: Lane) -> int:
        """Tokens below which a detector is never asked to read on."""
        reader, free = self._lane_of.get(DETECTOR), self.limits.free_rows
        return EAGER * free if reader is None else free // 2 if reader is lane else PATIENT * free

    def _feed_if_worth(self, lane: Lane, stream: Stream, decoding: int) -> int:
        """Let the detector read on where that pays, by the rules of `Answers._is_worth_a_chunk` for held-back text.
        Returns how many tokens it has not been given."""
        screen = stream.screen
        waiting = stream.stage.new - stream.new + lane.steps - stream.began - stream.fed
        if screen is not None and screen.todo:
            return waiting
        reader, free = self._lane_of.get(DETECTOR), self.limits.free_rows
        if reader is None:
            worth = waiting >= EAGER * free
        elif reader is lane:
            worth = free // 2 <= waiting <= lane.spare or waiting >= 4 * free
        else:
            worth = waiting >= free * PATIENT * (1 + decoding // 8)
        if not worth:
            return waiting
        lane.spare -= waiting
        self._feed(stream, waiting)
        return 0

    def _feed(self, stream: Stream, tokens: int) -> None:
        screen = stream.screen
        if screen is None:
            number, stage, _ = stream.order
            own = Stage("screen", DETECTOR, tokens)
            screen = Stream(stream.job, (number, stage, 1), own, 0, 0, 0, 0, True, of=stream)
            stream.screen = screen
        stream.fed += tokens
        if not tokens:
            return
        idle = not screen.todo
        screen.todo += tokens
        if self._lane_of.get(DETECTOR) is None:
            if idle:
                self._queue.append(screen)
                self._start_outside()
            return
        reader = self._lane_of[DETECTOR]
        if screen.admitted:
            self.kv += tokens
            if idle:
                reader.resume(screen)
        elif idle:
            reader.add(screen)

    def _start_outside(self) -> None:
        if self.placement.outside is None:
            return
        chunk, token = self.placement.outside
        while self._queue and len(self._outside) < self.placement.workers:
            stream = self._queue.pop(0)
            self._asked_outside += 1
            ends = self.now + chunk + token * stream.todo
            stream.done += stream.todo
            heapq.heappush(self._outside, (ends, self._asked_outside, stream))

    def _read(self, screen: Stream) -> None:
        """A detector has read all that it was given."""
        if not screen.closed:
            return
        if screen.admitted:
            self._release(self._lane_of[DETECTOR], screen)
        self._over(screen.job)

    # Requests and pages.

    def _next_stage(self, job: Job) -> None:
        job.stage += 1
        stage = job.stages[job.stage]
        order = (job.number, job.stage, 0)
        stream = Stream(job, order, stage, stage.prompt, stage.known, stage.new, stage.images, not stage.new)
        lane = self._lane_of.get(stage.model)
        if lane is None:  # a detector outside, which scores a whole text
            stream.of, stream.closed = stream, True
            self._queue.append(stream)
            self._start_outside()
        else:
            lane.add(stream)

    def _over(self, job: Job) -> None:
        """A pass is over."""
        if job.stage + 1 < len(job.stages):
            self._next_stage(job)
            return
        job.finished = self.now
        self.under_way -= 1
        self.finished.append(job)

    def _release(self, lane: Lane, stream: Stream) -> None:
        self.kv -= stream.done + stream.todo + self.limits.page // 2
        lane.held -= 1
        stream.admitted = False

    def _preempt(self) -> None:
        """While pages are missing, the youngest sequence of all waits, and is computed anew."""
        limit = self.limits.kv_tokens
        while limit is not None and self.kv > limit:
            held = [
                (stream.order, lane, stream)
                for device in self.devices
                for lane in device.lanes
                for stream in (*lane.decoding.values(), *(item[1] for item in lane.chunked))
            ]
            if len(held) < 2:
                return
            _, lane, stream = max(held, key=lambda item: item[0])
            if id(stream) in lane.decoding:
                self._leave_decoding(lane, stream)
                stream.new += 1  # the token that was sampled last is sampled again
            lane.chunked = [item for item in lane.chunked if item[1] is not stream]
            self._release(lane, stream)
            stream.todo, stream.done = stream.todo + stream.done, 0
            lane.add(stream)
            stream.job.preemptions += 1
            self.preemptions += 1


Route = Callable[[Sequence[Replica]], int]


def least_loaded(replicas: Sequence[Replica]) -> int:
    """The one with the fewest requests under way."""
    return min(range(len(replicas)), key=lambda index: replicas[index].under_way)


def simulate(
    replicas: Sequence[Replica],
    jobs: Iterable[Job],
    route: Route = least_loaded,
    hopeless: Callable[[Job], bool] | None = None,
) -> list[Job]:
    """Let the jobs, in the order of their arrival, come and be answered; returns them once the last one is.

    hopeless: is told of every job that ends; where it returns true the rest is left undone.
    """
    known: list[Job] = []
    for job in jobs:
        known.append(job)
        _run_until(replicas, job.asked.arrival)
        for replica in replicas if hopeless is not None else ():
            while replica.finished:
                if hopeless is not None and hopeless(replica.finished.pop()):
                    return known
        replicas[route(replicas)].submit(job)
    _run_until(replicas, inf)
    return known


def _run_until(replicas: Sequence[Replica], time: float) -> None:
    """All events up to `time`; where that is infinite, until nothing is left."""
    for replica in replicas:
        while True:
            replica.start()
            event = replica.next_event
            if event > time or event == inf:
                break
            replica.advance(event)
        if time != inf:
            replica.advance(time)
