"""The engine: requests are loops that yield passes; `step` runs one batch of every lane and sends results back.

It knows passes, never guards: whatever generator it is given, it drives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as Many
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Protocol, get_args

import torch

from .chat import Chat
from .driver import Driver
from .errors import BadInput, InvalidGuard, InvalidMessage, UnknownRequest
from .flight import Flight
from .images import ImageLimits
from .kv_pages import PagePool
from .models.eight_bits import weights_named
from .models.heads import IN_CONTEXT
from .models.loader import ModelSet, load_models
from .models.model import Model
from .models.sources import DetectorSource, Source
from .outside import OutsideDetector
from .passes import Decision, Generate, Loop, ModelTraits, Prompt, ReleaseMode
from .prepare import check_characters
from .request import Outcome, Replaced, Reply
from .runner import ModelRunner
from .running import Request
from .sampling import SamplingParams
from .scheduler import Lane, Scheduler
from .trace import Recorder, StepRecord, step_works


class GuardLike(Protocol):
    """What the engine needs of a guard: a loop for a chat. `traits` is by model name."""

    def run(self, chat: Chat, traits: Mapping[str, ModelTraits], release: ReleaseMode = "verdict") -> Loop: ...


class Engine:
    """Answers chats with a model, under a guard, many at a time.

    model, detector, detoxifier: a checkpoint folder, a GGUF file, a bundle ("smol"), a named shape with random
    weights ("tiny-llava" …), or a PEFT adapter and its base as a pair; a detector may also be a `Classifier`, which
    says what its labels mean, or an exported one that runs on threads of its own, "onnx:FOLDER". probe: a file with a
    head fitted on the states that the model has while it answers. A bundle brings its own detector, detoxifier and
    probe. `models` takes their place when they are loaded already; engines may share them.
    device: "cpu" or "cuda"; None takes CUDA where there is one. dtype: None takes bf16 where the device
    multiplies it, fp32 elsewhere. weights: "int8" or "fp8" (CUDA from sm_89 on) for the maps of all decoders'
    layers, quantized as they are loaded; None leaves them. kv_dtype: "fp8" for pages of half the bytes, with a scale
    for each layer and head that is measured when a model is loaded; None for those of `dtype`. kv_bytes: size of the
    page pool; None takes a quarter of what is free.
    max_batch_tokens: tokens that one step computes for one backbone. max_sequences: how many hold pages at once.

    Not thread-safe: one thread calls it. Raises a `CheckpointError` when a model cannot be loaded.
    """

    def __init__(
        self,
        model: Source | None = None,
        detector: DetectorSource | OutsideDetector | None = None,
        detoxifier: Source | None = None,
        *,
        probe: str | Path | None = None,
        models: ModelSet | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        kv_dtype: str | None = None,
        kv_bytes: int | None = None,
        max_batch_tokens: int | None = None,
        max_sequences: int = 128,
        tokens_per_page: int | None = None,
        image_limits: ImageLimits | None = None,
    ) -> None:
        for name, value in (
            ("kv_bytes", kv_bytes),
            ("max_batch_tokens", max_batch_tokens),
            ("max_sequences", max_sequences),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadInput(f"{name} must be a whole number of at least 1, not {value!r}")
        if models is None:
            if model is None:
                raise BadInput("name a model: a checkpoint folder, a GGUF file, a bundle or a named shape")
            kind = None if weights is None else weights_named(weights)
            models = load_models(
                model, detector, detoxifier, probe, device=device, dtype=dtype, weights=kind, kv_dtype=kv_dtype
            )
        elif weights is not None or kv_dtype is not None:
            raise BadInput("models are loaded already: give weights and kv_dtype to load_models")
        cuda = models.device.type == "cuda"
        self.models = models.models
        self.device = models.device
        self.image_limits = image_limits or ImageLimits()
        self._page_size = tokens_per_page or 64
        if self._page_size < 16 or self._page_size & (self._page_size - 1):
            raise BadInput(f"tokens_per_page must be a power of two of at least 16, not {self._page_size}")
        layouts = [item.layout(self._page_size) for item in self.models.values()]
        plain = not cuda or any(item.backbone.decoder.fused is None for item in self.models.values())
        self.pool = PagePool(kv_bytes or _default_kv_bytes(self.device), layouts, self.device, zeroed=plain)
        backbones = {id(item.backbone): item.backbone for item in self.models.values()}
        budget = max(max_batch_tokens or (8192 if cuda else 512), max_sequences)
        # One tile of a matrix unit has 16 rows; a GPU reads the weights for 64 rows as fast as for one.
        free_rows = 64 if cuda else 16
        self.lanes = [
            Lane(
                backbone,
                "+".join(name for name, item in self.models.items() if item.backbone is backbone),
                budget,
                max_sequences,
                free_rows,
            )
            for backbone in backbones.values()
        ]
        self.scheduler = Scheduler(self.pool, self.lanes)
        self.runner = ModelRunner(self.pool, self.lanes, self.models, (1 << 30) if cuda else (256 << 20))
        self.outside = models.outside
        self.traits = {name: _traits(item, self.lanes) for name, item in self.models.items()}
        self.traits |= {
            name: ModelTraits(
                item.spec.template, backbone=-1, reads_along=item.incremental, threshold=item.spec.threshold
            )
            for name, item in self.outside.items()
        }
        self.driver = Driver(self.models, self.outside, self.scheduler, self.runner, self._page_size)
        self.steps = 0
        self.recorder: Recorder | None = None  # told of every step and reply

    # For callers.

    def chat(
        self, chats: Any, *, guard: GuardLike | None = None, sampling: SamplingParams | None = None
    ) -> list[Reply]:
        """Answer chats together; the replies come in their order.

        chats: a list of chats, each a string or a list of messages (of `transformers` chat templates or
        OpenAI's). Bad input raises a `BadInput` before anything runs, and leaves nothing behind.
        """
        if isinstance(chats, str | Chat) or not isinstance(chats, Iterable):
            raise InvalidMessage("chat() takes a list of chats: [[{'role': 'user', 'content': '…'}], …] or ['…', …]")
        many = list(chats)
        if many and isinstance(many[0], Mapping):
            raise InvalidMessage("chat() takes a list of chats; put this one chat into a list: [messages]")
        return self._run_all(partial(self.submit, one, guard=guard, sampling=sampling) for one in many)

    def generate(self, prompts: Any, sampling: SamplingParams | None = None) -> list[Reply]:
        """Continue raw prompts, a list of strings or of lists of token ids, unguarded and without a template."""
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise InvalidMessage("generate() takes a list of prompts: ['…', …] or [[1, 2, 3], …]")
        return self._run_all(partial(self.submit_prompt, one, sampling) for one in prompts)

    def stream(
        self,
        messages: Any,
        *,
        guard: GuardLike | None = None,
        sampling: SamplingParams | None = None,
        release: ReleaseMode = "verdict",
    ) -> Generator[str | Replaced, None, Reply]:
        """Yield the reply's text as it may be shown; the generator's return value is the `Reply`.

        release: under a guard, when text leaves. "verdict": when all of it is cleared. "window": as soon as a
        beginning that covers it is cleared; where the answer turns out harmful, a `Replaced` event ends the stream,
        with the text that takes the place of what was shown. "audit": at once, verdicts are for the record.
        Closing the generator aborts the request.
        """
        request = self.submit(messages, guard=guard, sampling=sampling, streaming=True, release=release)
        try:
            while request.reply is None:
                self.step()
                yield from request.take()
            yield from request.take()
            return request.reply
        finally:
            if request.reply is None:
                self.abort(request.id)

    # The engine proper.

    def submit(
        self,
        messages: Any,
        *,
        guard: GuardLike | None = None,
        sampling: SamplingParams | None = None,
        salt: str | None = None,
        streaming: bool = False,
        release: ReleaseMode = "verdict",
    ) -> Request:
        """Queue a chat and return its handle. Raises a `BadInput` when it can be seen now that it cannot run.

        salt: requests share cached pages only with requests of the same salt (tenants). release: see `stream`.
        """
        chat = Chat.parse(messages, self.image_limits)
        if release not in get_args(ReleaseMode):
            raise BadInput(f"release must be one of {', '.join(get_args(ReleaseMode))}, not {release!r}")
        if guard is None:
            return self.driver.submit(_unguarded(chat), sampling, salt, streaming, guarded=False)
        if not callable(getattr(guard, "run", None)):
            raise InvalidGuard(f"a guard is a Guard object, for example Guard.protector(), not {guard!r}")
        loop = guard.run(chat, self.traits) if release == "verdict" else guard.run(chat, self.traits, release)
        return self.driver.submit(loop, sampling, salt, streaming, guarded=True)

    def submit_prompt(
        self, prompt: str | Many[int], sampling: SamplingParams | None = None, *, streaming: bool = False
    ) -> Request:
        """Queue a raw prompt; see `generate`."""
        return self.driver.submit(_unguarded(self.encode_prompt(prompt)), sampling, None, streaming, guarded=False)

    def encode_prompt(self, prompt: str | Many[int]) -> tuple[int, ...]:
        """The token ids of a raw prompt. Raises a `BadInput` for what is none."""
        model = self.models["mllm"]
        codec = model.codec
        if isinstance(prompt, str):
            check_characters(model, len(prompt))
            ids = codec.encode_text(prompt)
        elif isinstance(prompt, list | tuple):
            ids = list(prompt)
        else:
            raise InvalidMessage(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}")
        if not ids:
            raise InvalidMessage("a prompt must have at least one token")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < codec.vocab_size:
                raise InvalidMessage(
                    f"token ids must be whole numbers from 0 to {codec.vocab_size - 1}, not {token!r}"
                )
        return tuple(ids)

    def abort(self, number: int) -> Reply:
        """End a request at once, whatever it is doing; nothing of it is shown. Raises `UnknownRequest`."""
        request = self.driver.requests.get(number)
        if request is None:
            raise UnknownRequest(f"no request {number} is under way")
        return self.driver.abort(request)

    @property
    def has_work(self) -> bool:
        return bool(self.driver.requests) or any(lane.flights for lane in self.lanes)

    def step(self) -> list[Reply]:
        """Launch what every lane can run and take in what has ended, at least one batch; return the replies of the
        requests that this finished.

        On the CPU a batch has ended when it is launched, so lanes run one after another. On a GPU they run beside
        each other, and a decoding step is launched before the tokens of the one in front of it are known here.

        Raises `DeviceLost` where the GPU has failed; no later step runs then.
        """
        try:
            return self._step()
        except RuntimeError:  # of a batch in flight, which nobody can take in
            self.runner.check_device()
            raise

    def _step(self) -> list[Reply]:
        driver = self.driver
        driver.finished = []
        driver.collect()
        driver.expire()
        landed = False
        for lane in self.lanes:
            with self.runner.on(lane):
                while len(lane.flights) < self.runner.ahead and self._launch(lane):
                    pass
                landed |= self._land(lane)
        if not landed and not self._land_first():
            driver.wait()
        self.steps += 1
        if self.recorder is not None:
            for request in driver.finished:
                assert request.reply is not None
                self.recorder.finish(request.reply, request.submitted)
        return [request.reply for request in driver.finished if request.reply is not None]

    def _launch(self, lane: Lane) -> bool:
        """Launch a lane's next batch; whether there is one and it flies."""
        works = self.scheduler.follow(lane) if lane.flights else self.scheduler.schedule(lane)
        if not works or (lane.flights and not self.runner.decodes(lane, works)):
            return False
        began, vision = perf_counter(), self.runner.vision_seconds
        self.driver.begun(works)
        try:
            result = self.runner.run(lane, works)
        except Exception as error:  # the batch is lost; the engine is not, or says so
            self.runner.check_device()
            self.driver.lost(works, error)
            return False
        lane.flights.append(Flight(works, result, began, self.runner.vision_seconds - vision))
        return True

    def _land(self, lane: Lane) -> bool:
        """Take in what has ended of a lane's batches, in their order; whether anything has."""
        landed = False
        while lane.flights and lane.flights[0].has_ended:
            flight = lane.flights.pop(0)
            landed = True
            self.scheduler.landed(flight)
            works = [work for work in flight.works if work.sequence not in flight.dropped]
            try:
                result = flight.result.collect()
                if self.recorder is not None:
                    began, lane.landed = max(flight.began, lane.landed), perf_counter()
                    self.recorder.record(StepRecord(lane.name, began, lane.landed, flight.vision, step_works(works)))
                for work in works:
                    self.scheduler.advance(work)
                self.driver.expire()  # a result that comes too late is none
                self.driver.deliver(lane, result, flight.dropped)
            except Exception as error:  # as above
                self.runner.check_device()
                self.driver.lost(works, error)
        return landed

    def _land_first(self) -> bool:
        """Wait until a batch has ended, and take it in; whether there is any."""
        flying = [lane for lane in self.lanes if lane.flights]
        if len(flying) == 1:
            flying[0].flights[0].wait()
        while flying and not any(lane.flights[0].has_ended for lane in flying):
            sleep(0)  # lets other threads run; the wait is for a part of a step
        for lane in flying:
            with self.runner.on(lane):
                self._land(lane)
        return bool(flying)

    def close(self) -> None:
        """Abort what is under way and close the detectors that run outside, also for engines that share them.

        Only an engine with such a detector has anything to close.
        """
        for number in list(self.driver.requests):
            self.abort(number)
        for detector in self.outside.values():
            detector.close()

    def check_integrity(self) -> None:
        """Raise `PoolCorrupted` unless every page of the pool is accounted for."""
        tables = [sequence.table.pages for sequence in self.scheduler.sequences()]
        self.pool.check_integrity([*tables, *self.scheduler.held_pages()])

    # Requests.

    def _run_all(self, submits: Iterable[Callable[[], Request]]) -> list[Reply]:
        requests: list[Request] = []
        try:
            for submit in submits:
                requests.append(submit())
            while any(request.reply is None for request in requests):
                self.step()
        except BaseException:
            for request in requests:
                if request.reply is None:
                    self.abort(request.id)
            raise
        return [request.reply for request in requests if request.reply is not None]


def _traits(model: Model, lanes: list[Lane]) -> ModelTraits:
    template, threshold = (model.spec.template, model.spec.threshold) if model.spec else (None, None)
    backbone = next(index for index, lane in enumerate(lanes) if lane.backbone is model.backbone)
    return ModelTraits(
        template,
        model.chat_only,
        backbone,
        continues=bool(model.invocation),
        in_context=template == IN_CONTEXT,
        threshold=threshold,
        special_tokens=model.codec.special_tokens,
    )


def _unguarded(prompt: Prompt) -> Loop:
    answer = yield Generate("mllm", prompt, release="live")
    return Decision(answer, Outcome.UNGUARDED)


def _default_kv_bytes(device: torch.device) -> int:
    """A quarter of the memory that is free now; on a CPU at most 2 GiB (pages are touched only when used)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 1 << 18
    return min(2 << 30, pages * os.sysconf("SC_PAGE_SIZE") // 4)
