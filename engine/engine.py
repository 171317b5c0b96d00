"""The engine: requests are loops that yield passes; `step` runs one batch of every lane and sends results back.

It knows passes, never guards: whatever generator it is given, it drives.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as Many
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch

from .chat import Chat
from .errors import (
    BadInput,
    InvalidGuard,
    InvalidMessage,
    PassError,
    PassTimeout,
    PromptTooLong,
    StockadeError,
    TooLong,
    UnknownModel,
    UnknownRequest,
)
from .images import ImageLimits
from .kv_pages import PagePool
from .models.loader import ModelSet, Source, load_models
from .models.model import Model
from .output import OutputText
from .passes import Answer, Choose, Chosen, Decision, Generate, Loop, ModelTraits, Pass, Prompt, Score, Scored
from .prepare import Identity, check_characters, make_sequence
from .request import FinishReason, Outcome, PassRecord, Reply, Trace, Usage
from .runner import ModelRunner, StepResult
from .sampling import Sampled, SamplerRow, SamplingParams, sample
from .scheduler import Lane, Scheduler
from .sequence import Sequence


class GuardLike(Protocol):
    """What the engine needs of a guard: a loop for a chat. `traits` is by model name."""

    def run(self, chat: Chat, traits: Mapping[str, ModelTraits]) -> Loop: ...


class Request:
    """A request under way, and its handle for the caller: `reply` is None until it is finished."""

    def __init__(self, number: int, loop: Loop, sampling: SamplingParams, salt: str | None, streaming: bool) -> None:
        self.id = number
        self.loop = loop
        self.sampling = sampling
        self.salt = salt
        self.streaming = streaming
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.submitted = perf_counter()
        self.sequence: Sequence | None = None
        self.live = False  # whether the text of the pass under way may leave while it is decoded
        self.output: OutputText | None = None
        self.passes: list[PassRecord] = []
        self.usage: dict[str, Usage] = {}
        self.sampled: dict[tuple[int, ...], list[Sampled]] = {}
        self.overhead = 0.0
        self.reply: Reply | None = None
        self._ready: list[str] = []
        self._shown = 0  # characters made ready so far

    @property
    def elapsed(self) -> float:
        return perf_counter() - self.submitted

    def take_text(self) -> str:
        """The text that may be shown and was not taken yet, where streaming was asked for."""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def show(self, text: str) -> None:
        if self.streaming and text:
            self._shown += len(text)
            self._ready.append(text)

    def show_rest(self, text: str) -> None:
        """Make ready what of the final text was not shown while it was decoded."""
        self.show(text[self._shown :])


class Engine:
    """Answers chats with a model, under a guard, many at a time.

    model, detector, detoxifier: a checkpoint folder, a GGUF file, a bundle ("smol"), a named shape with random
    weights ("tiny-llava" …), or a PEFT adapter and its base as a pair. A bundle brings its own detector and
    detoxifier. `models` takes their place when they are loaded already; engines may share them.
    device: "cpu" or "cuda"; None takes CUDA where there is one. dtype: None takes bf16 where the device
    multiplies it, fp32 elsewhere. kv_bytes: size of the page pool; None takes a quarter of what is free.
    max_batch_tokens: tokens that one step computes for one backbone. max_sequences: how many hold pages at once.

    Not thread-safe: one thread calls it. Raises a `CheckpointError` when a model cannot be loaded.
    """

    def __init__(
        self,
        model: Source | None = None,
        detector: Source | None = None,
        detoxifier: Source | None = None,
        *,
        models: ModelSet | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
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
            models = load_models(model, detector, detoxifier, device=device, dtype=dtype)
        cuda = models.device.type == "cuda"
        self.models = models.models
        self.device = models.device
        self.image_limits = image_limits or ImageLimits()
        self._page_size = tokens_per_page or (16 if cuda else 64)
        if self._page_size < 16 or self._page_size & (self._page_size - 1):
            raise BadInput(f"tokens_per_page must be a power of two of at least 16, not {self._page_size}")
        layouts = [item.layout(self._page_size) for item in self.models.values()]
        self.pool = PagePool(kv_bytes or _default_kv_bytes(self.device), layouts, self.device)
        backbones = {id(item.backbone): item.backbone for item in self.models.values()}
        budget = max(max_batch_tokens or (8192 if cuda else 512), max_sequences)
        self.lanes = [Lane(backbone, budget, max_sequences) for backbone in backbones.values()]
        self.scheduler = Scheduler(self.pool, self.lanes)
        self.runner = ModelRunner(self.pool, self.lanes, feature_bytes=(1 << 30) if cuda else (256 << 20))
        self.traits = {
            name: ModelTraits(item.head.spec.template if item.head else None, item.chat_only)
            for name, item in self.models.items()
        }
        self.requests: dict[int, Request] = {}
        self.steps = 0
        self._next_id = 0
        self._finished: list[Reply] = []

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
        self, messages: Any, *, guard: GuardLike | None = None, sampling: SamplingParams | None = None
    ) -> Generator[str, None, Reply]:
        """Yield the reply's text as it may be shown; the generator's return value is the `Reply`.

        Under a guard nothing is shown before its verdict. Closing the generator aborts the request.
        """
        request = self.submit(messages, guard=guard, sampling=sampling, streaming=True)
        try:
            while request.reply is None:
                self.step()
                if text := request.take_text():
                    yield text
            if text := request.take_text():
                yield text
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
    ) -> Request:
        """Queue a chat and return its handle. Raises a `BadInput` when it can be seen now that it cannot run.

        salt: requests share cached pages only with requests of the same salt (tenants).
        """
        chat = Chat.parse(messages, self.image_limits)
        if guard is None:
            return self._submit(_unguarded(chat), sampling, salt, streaming)
        if not callable(getattr(guard, "run", None)):
            raise InvalidGuard(f"a guard is a Guard object, for example Guard.protector(), not {guard!r}")
        return self._submit(guard.run(chat, self.traits), sampling, salt, streaming)

    def submit_prompt(
        self, prompt: str | Many[int], sampling: SamplingParams | None = None, *, streaming: bool = False
    ) -> Request:
        """Queue a raw prompt; see `generate`."""
        model = self._model("mllm")
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
        return self._submit(_unguarded(tuple(ids)), sampling, None, streaming)

    def abort(self, number: int) -> Reply:
        """End a request at once, whatever it is doing; nothing of it is shown. Raises `UnknownRequest`."""
        request = self.requests.get(number)
        if request is None:
            raise UnknownRequest(f"no request {number} is under way")
        if request.sequence is not None:
            request.sequence.record.error = "aborted"
            self._end_pass(request)
        request.loop.close()
        return self._finish(request, Decision(Answer(""), Outcome.REFUSED, (), "aborted"), FinishReason.ABORTED)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Reply]:
        """Run one batch of every lane that has work; return the replies of the requests that this finished."""
        self._finished = []
        self._expire()
        for lane in self.lanes:
            works = self.scheduler.schedule(lane)
            if not works:
                continue
            for work in works:
                if work.sequence.record.started is None:
                    work.sequence.record.started = self._request(work.sequence).elapsed
            try:
                result = self.runner.run(lane, works)
                for work in works:
                    self.scheduler.advance(work)
                self._expire()  # a result that comes too late is none
                self._deliver(result)
            except Exception as error:  # the batch is lost, the engine is not
                for work in works:
                    if self._is_under_way(work.sequence):
                        self._fail_pass(work.sequence, PassError(f"{type(error).__name__}: {error}"))
        self.steps += 1
        return self._finished

    def check_integrity(self) -> None:
        """Raise `PoolCorrupted` unless every page of the pool is accounted for."""
        self.pool.check_integrity(sequence.table.pages for sequence in self.scheduler.sequences())

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

    def _submit(self, loop: Loop, sampling: SamplingParams | None, salt: str | None, streaming: bool) -> Request:
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise BadInput(f"sampling is a SamplingParams object, not {sampling!r}")
        request = Request(self._next_id, loop, sampling or SamplingParams(), salt, streaming)
        self._next_id += 1
        began = perf_counter()
        try:
            self._begin_pass(request, next(loop))
        except StopIteration as stop:  # decided without any pass
            self._finish(request, stop.value)
            return request
        except BaseException:
            loop.close()
            raise
        request.overhead += perf_counter() - began
        self.requests[request.id] = request
        return request

    def _resume(self, request: Request, result: Any = None, error: PassError | None = None) -> None:
        """Send a pass's result, or raise its error, into the loop, and start what it asks for next."""
        began = perf_counter()
        while True:
            try:
                step = request.loop.send(result) if error is None else request.loop.throw(error)
            except StopIteration as stop:
                request.overhead += perf_counter() - began
                self._finish(request, stop.value)
                return
            except Exception as failure:
                request.overhead += perf_counter() - began
                reason = str(failure) or type(failure).__name__
                refusal = Decision(Answer(""), Outcome.REFUSED, (), reason)
                self._finish(request, refusal, FinishReason.ERROR)
                return
            try:
                self._begin_pass(request, step)
            except PassError as failure:
                error = failure
            except PromptTooLong as failure:
                error = TooLong(str(failure))
            except StockadeError as failure:
                error = PassError(str(failure))
            except Exception as failure:  # a tokenizer or an image processor fails as it likes
                error = PassError(f"{type(failure).__name__}: {failure}")
            else:
                request.overhead += perf_counter() - began
                return

    def _finish(self, request: Request, decision: Decision, reason: FinishReason | None = None) -> Reply:
        if not isinstance(decision, Decision):
            why = f"the guard's loop returned {type(decision).__name__}, not a Decision"
            decision, reason = Decision(Answer(""), Outcome.REFUSED, (), why), FinishReason.ERROR
        if reason is None:
            reason = FinishReason.REFUSED if decision.outcome is Outcome.REFUSED else FinishReason.STOP
            if reason is FinishReason.STOP and decision.answer.finish_reason == "length":
                reason = FinishReason.LENGTH
        request.show_rest(decision.answer.text)
        _attach_verdicts(request.passes, decision)
        request.reply = Reply(
            id=request.id,
            text=decision.answer.text,
            token_ids=list(decision.answer.ids),
            outcome=decision.outcome,
            finish_reason=reason,
            verdicts=list(decision.verdicts),
            passes=request.passes,
            usage=request.usage,
            trace=_trace(request),
            logprobs=_logprobs(request, decision.answer),
            error=decision.reason,
        )
        self.requests.pop(request.id, None)
        self._finished.append(request.reply)
        return request.reply

    # Passes.

    def _model(self, name: str) -> Model:
        if name not in self.models:
            raise UnknownModel(f"this engine has no {name!r}; it has {', '.join(sorted(self.models))}")
        return self.models[name]

    def _begin_pass(self, request: Request, step: Pass) -> None:
        if not isinstance(step, Generate | Score | Choose):
            raise InvalidGuard(f"a guard's loop may yield Generate, Score or Choose, not {step!r}")
        record = PassRecord(step.label, step.model, submitted=request.elapsed)
        request.passes.append(record)
        try:
            model = self._model(step.model)
            sampling = (step.sampling if isinstance(step, Generate) else None) or request.sampling
            who = Identity(request.id, len(request.passes) - 1, request.seed, request.salt)
            sequence = make_sequence(step, model, who, sampling, record, self.pool, self._page_size)
            self.scheduler.check_fits(sequence.table.layout, sequence.limit)
        except Exception as error:
            record.error = str(error) or type(error).__name__
            record.finished = record.submitted
            raise
        record.prompt_tokens = sequence.prompt_tokens
        record.candidate = isinstance(step, Generate) and step.candidate
        live = isinstance(step, Generate) and step.release == "live" and request.streaming
        request.output = None
        if sequence.sampling is not None and (live or sequence.sampling.stop):
            request.output = OutputText(model.codec.detokenizer(), sequence.sampling.stop)
        request.live = live
        request.sequence = sequence
        self.scheduler.add(sequence)

    def _request(self, sequence: Sequence) -> Request:
        return self.requests[sequence.order[0]]

    def _is_under_way(self, sequence: Sequence) -> bool:
        request = self.requests.get(sequence.order[0])
        return request is not None and request.sequence is sequence

    def _end_pass(self, request: Request) -> None:
        """Take the request's sequence out of the scheduler and account for it."""
        sequence, request.sequence = request.sequence, None
        assert sequence is not None
        self.scheduler.remove(sequence)
        record = sequence.record
        record.token_ids = sequence.tokens[sequence.prompt_tokens :]
        record.finished = request.elapsed
        usage = request.usage.setdefault(record.model, Usage())
        usage.prompt += record.prompt_tokens
        usage.cached += record.cached_tokens
        usage.generated += len(record.token_ids)

    def _fail_pass(self, sequence: Sequence, error: PassError) -> None:
        request = self._request(sequence)
        sequence.record.error = str(error)
        self._end_pass(request)
        self._resume(request, error=error)

    def _expire(self) -> None:
        """Passes past their deadline fail; their loops decide what that means."""
        late = [s for s in self.scheduler.sequences() if s.deadline is not None and perf_counter() > s.deadline]
        for sequence in late:
            self._fail_pass(sequence, PassTimeout(f"the {sequence.record.label} pass took too long"))

    def _deliver(self, result: StepResult) -> None:
        """Turn a step's logits and scores into tokens and results, and resume the loops that waited for them."""
        for sequence, score in result.scores:
            if not self._is_under_way(sequence):
                continue
            assert sequence.model.head is not None
            request = self._request(sequence)
            self._end_pass(request)
            self._resume(request, Scored(score, sequence.model.head.spec.threshold))
        if result.logits is None:
            return
        alive = [(index, s) for index, s in enumerate(result.sequences) if self._is_under_way(s)]
        rows = [
            SamplerRow(s.sampling, s.tokens, s.seed, s.order[1], s.num_tokens - s.prompt_tokens)
            for _, s in alive
            if s.sampling is not None
        ]
        choosing = [index for index, s in alive if s.sampling is None]
        generating = [index for index, s in alive if s.sampling is not None]
        for index in choosing:
            self._chosen(result.sequences[index], result.logits[index])
        logits = result.logits if len(generating) == len(result.logits) else result.logits[generating]
        if generating:
            for index, sampled in zip(generating, sample(logits, rows), strict=True):
                self._sampled(result.sequences[index], sampled)

    def _chosen(self, sequence: Sequence, logits: torch.Tensor) -> None:
        request = self._request(sequence)
        self._end_pass(request)
        probs = logits.float().softmax(-1)
        self._resume(request, Chosen(tuple(float(probs[list(ids)].sum()) for ids in sequence.words)))

    def _sampled(self, sequence: Sequence, sampled: Sampled | None) -> None:
        """Append a token; where it is the last one, send the answer to the loop."""
        if sampled is None:
            self._fail_pass(sequence, PassError("the model's logits are not finite numbers"))
            return
        request, params = self._request(sequence), sequence.sampling
        assert params is not None
        token = sampled.token
        sequence.append(token)
        if params.logprobs is not None:
            sequence.sampled.append(sampled)
        if sequence.record.first_token is None:
            sequence.record.first_token = request.elapsed
        codec = sequence.model.codec
        ended = token in params.stop_token_ids or (token in codec.eos_ids and not params.ignore_eos)
        output = request.output
        if output is not None and not ended:
            text = output.push(token)
            if request.live:
                request.show(text)
        stopped = output is not None and output.stopped
        if not (ended or stopped or sequence.num_tokens >= sequence.limit):
            return
        reason = "stop" if ended or stopped else "length"
        sequence.record.finish_reason = reason
        self._end_pass(request)
        ids = tuple(sequence.record.token_ids)
        if output is None:
            text = codec.decode(ids[:-1] if ended else ids)
        else:
            output.flush()
            text = output.text
        sequence.record.text = text
        if sequence.sampled:
            request.sampled[ids] = sequence.sampled
        self._resume(request, Answer(text, ids, finish_reason=reason))


def _unguarded(prompt: Prompt) -> Loop:
    answer = yield Generate("mllm", prompt, release="live")
    return Decision(answer, Outcome.UNGUARDED)


def _attach_verdicts(passes: list[PassRecord], decision: Decision) -> None:
    """Give each verdict to the pass whose text it judged: verdicts come in the order of the answers."""
    answers = [record for record in passes if record.candidate and record.error is None]
    for record, judged in zip(answers, decision.judged, strict=False):
        record.verdict = judged.verdict


def _logprobs(request: Request, answer: Answer) -> list[list[tuple[int, float]]] | None:
    """For each token of the shown answer: (token, its log-probability), then the likeliest ones."""
    sampled = request.sampled.get(answer.ids)
    if sampled is None:
        return None
    return [[(item.token, item.logprob if item.logprob is not None else 0.0), *item.top] for item in sampled]


def _trace(request: Request) -> Trace:
    total = request.elapsed
    if not request.passes:
        return Trace(total=total, queued=total, answer=total, overhead=request.overhead)
    first = request.passes[0]
    answered = total if first.finished is None else first.finished
    return Trace(
        total=total,
        queued=total if first.started is None else first.started,
        first_token=first.first_token,
        answer=answered,
        guard=total - answered,
        overhead=request.overhead,
    )


def _default_kv_bytes(device: torch.device) -> int:
    """A quarter of the memory that is free now; on a CPU at most 2 GiB (pages are touched only when used)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 1 << 18
    return min(2 << 30, pages * os.sysconf("SC_PAGE_SIZE") // 4)
