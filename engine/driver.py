"""Drives the loops of requests: begins the passes they ask for, turns results into tokens, verdicts and replies.

It says what has to be computed and what is made of it; when that happens is the scheduler's business, how the
runner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from contextlib import suppress
from threading import Event
from time import perf_counter
from typing import Any

import torch

from .errors import (
    BadInput,
    InvalidGuard,
    PassError,
    PassTimeout,
    PromptTooLong,
    StockadeError,
    TooLong,
    UnknownModel,
)
from .models.model import Model
from .output import OutputText
from .outside import OutsideDetector, OutsideText
from .passes import (
    Ahead,
    Answer,
    Ask,
    Cancel,
    Choose,
    Chosen,
    Decision,
    Generate,
    Handle,
    Loop,
    Pass,
    Score,
    Scored,
    Start,
    Stream,
    Wait,
)
from .prepare import Encoded, Identity, encode, make_sequence, new_sequence, outside_tokens
from .request import FinishReason, Outcome, PassRecord, Reply, Usage
from .runner import ModelRunner, StepResult
from .running import OutsideRun, Request, Run
from .sampling import Sampled, SamplerRow, SamplingParams, sample
from .scheduler import Lane, Scheduler, Work
from .screening import InLane, Reader, Screening
from .sequence import Sequence

# What a detector with weights of its own reads at a time, in free rows of a lane: as little as pays where something
# waits for it; otherwise so much that reading its weights is at most half of the work.
EAGER, PATIENT = 2, 8
_OUTSIDE_WAIT = 0.005  # seconds that a step without work waits for a detector outside
TAP_EVERY = 8  # tokens between two scores of a head on an answer's own states, where anything depends on them


class Driver:
    """All requests under way, by id. unscreened_characters: shown under a guard before a verdict covered them, in all
    requests so far; 0 unless release="audit" was asked for."""

    def __init__(
        self,
        models: Mapping[str, Model],
        outside: Mapping[str, OutsideDetector],
        scheduler: Scheduler,
        runner: ModelRunner,
        page_size: int,
    ) -> None:
        self.models = models
        self.outside = outside
        self.scheduler = scheduler
        self.runner = runner
        self.pool = scheduler.pool
        self.requests: dict[int, Request] = {}
        self.finished: list[Request] = []  # since the last step began
        self.unscreened_characters = 0
        self._page_size = page_size
        self._next_id = 0
        self._told = Event()  # by a detector outside, that it has something

    def submit(
        self, loop: Loop, sampling: SamplingParams | None, salt: str | None, streaming: bool, guarded: bool
    ) -> Request:
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise BadInput(f"sampling is a SamplingParams object, not {sampling!r}")
        request = Request(self._next_id, loop, sampling or SamplingParams(), salt, streaming, guarded)
        self._next_id += 1
        began = perf_counter()
        try:
            ask = next(loop)
            if not isinstance(ask, Start | Wait | Cancel):
                request.waiting_for = self._begin(request, ask).number
        except StopIteration as stop:  # decided without any pass
            self.finish(request, stop.value)
            return request
        except BaseException:
            loop.close()
            raise
        self.requests[request.id] = request
        request.overhead += perf_counter() - began
        if request.waiting_for < 0:
            self._resume(request, ask=ask)
        return request

    def _resume(
        self, request: Request, result: Any = None, error: PassError | None = None, ask: Ask | None = None
    ) -> None:
        """Send a pass's result, or raise its error, into the loop, and do what it asks for next. ask: what it asked
        for already."""
        began = perf_counter()
        request.waiting_for = -1
        while request.waiting_for < 0 and request.reply is None:
            try:
                if ask is None:
                    ask = request.loop.send(result) if error is None else request.loop.throw(error)
            except StopIteration as stop:
                request.overhead += perf_counter() - began
                self.finish(request, stop.value)
                return
            except Exception as failure:
                request.overhead += perf_counter() - began
                reason = str(failure) or type(failure).__name__
                refusal = Decision(Answer(""), Outcome.REFUSED, (), reason)
                self.finish(request, refusal, FinishReason.ERROR)
                return
            result, error = None, None
            try:
                result = self._answer(request, ask)
            except Exception as failure:
                error = _pass_error(failure)
            ask = None
        request.overhead += perf_counter() - began

    def _answer(self, request: Request, ask: Ask) -> Any:
        """What the loop gets for what it asked at once; sets `waiting_for` where it has to wait."""
        if isinstance(ask, Start):
            number = len(request.passes)
            try:
                self._begin(request, ask.what, started=True)
            except Exception as error:  # told to whoever waits for it
                if number == len(request.passes):  # it is no pass
                    raise
                request.results[number] = _pass_error(error)
            return Handle(number)
        if not isinstance(ask, Wait | Cancel):
            request.waiting_for = self._begin(request, ask).number
            return None
        number = ask.handle.number
        run = request.runs.get(number)
        if isinstance(ask, Cancel):
            if request.results.pop(number, None) is not None:
                request.wasted += request.passes[number].computed_tokens
            if run is not None:
                run.record.error = "canceled"
                self._give_up(request, run)
            return None
        if number in request.results:
            result = request.results.pop(number)
            if isinstance(result, PassError):
                raise result
            return result
        if run is None:
            raise InvalidGuard(f"a guard's loop waits for a pass that it did not start, or waited for: {number}")
        self._require(run)
        request.waiting_for = number
        return None

    def _require(self, run: Run | OutsideRun) -> None:
        """A started pass is waited for."""
        run.started = False
        deadline = None if run.step.timeout is None else perf_counter() + run.step.timeout
        if isinstance(run, OutsideRun):
            run.text.deadline = deadline
            return
        if run.ready is None:
            run.sequence.deadline = deadline
        for sequence in run.sequences:
            if sequence is not run.ahead:
                self.scheduler.require(sequence)

    def abort(self, request: Request) -> Reply:
        """End a request at once, whatever it is doing."""
        for run in request.runs.values():
            run.record.error = "aborted"
        with suppress(Exception):  # a loop that fails as it is closed, or goes on, is over all the same
            request.loop.close()
        return self.finish(request, Decision(Answer(""), Outcome.REFUSED, (), "aborted"), FinishReason.ABORTED)

    def finish(self, request: Request, decision: Decision, reason: FinishReason | None = None) -> Reply:
        for run in list(request.runs.values()):
            if run.started:
                self._give_up(request, run)
            else:
                self._end(request, run)
        request.wasted += sum(request.passes[number].computed_tokens for number in request.results)
        if not isinstance(decision, Decision):
            why = f"the guard's loop returned {type(decision).__name__}, not a Decision"
            decision, reason = Decision(Answer(""), Outcome.REFUSED, (), why), FinishReason.ERROR
        if reason is None:
            reason = FinishReason.REFUSED if decision.outcome is Outcome.REFUSED else FinishReason.STOP
            if reason is FinishReason.STOP and decision.answer.finish_reason == "length":
                reason = FinishReason.LENGTH
        request.conclude(decision.answer.text, decision.reason or decision.outcome)
        request.wasted += request.ahead_tokens
        self.unscreened_characters += request.unscreened
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
            trace=request.trace(),
            logprobs=_logprobs(request, decision.answer),
            error=decision.reason,
        )
        self.requests.pop(request.id, None)
        self.finished.append(request)
        return request.reply

    # Passes.

    def model(self, name: str) -> Model:
        if name not in self.models:
            if name in self.outside:
                raise InvalidGuard(f"{name} runs outside the engine: it scores texts, and does nothing else")
            known = ", ".join(sorted([*self.models, *self.outside]))
            raise UnknownModel(f"this engine has no {name!r}; it has {known}")
        return self.models[name]

    def _begin(self, request: Request, step: Pass, started: bool = False) -> Run | OutsideRun:
        if not isinstance(step, Generate | Score | Choose):
            raise InvalidGuard(
                f"a guard's loop may yield Generate, Score, Choose, Start, Wait or Cancel, not {step!r}"
            )
        number = len(request.passes)
        record = PassRecord(step.label, step.model, submitted=request.elapsed)
        request.passes.append(record)
        try:
            if isinstance(step, Score) and step.model in self.outside:
                return self._begin_outside(request, number, step, record, started)
            model = self.model(step.model)
            sampling = (step.sampling if isinstance(step, Generate) else None) or request.sampling
            who = Identity(request.id, number, 0, request.generations, request.seed, request.salt)
            sequence = make_sequence(step, model, who, sampling, record, self.pool, self._page_size)
            self.scheduler.check_fits(sequence.table.layout, sequence.limit)
            run = Run(number, step, record, sequence, started=started)
            if isinstance(step, Generate):
                self._begin_answer(request, run, step)
        except Exception as error:
            record.error = str(error) or type(error).__name__
            record.finished = record.submitted
            raise
        record.prompt_tokens = sequence.prompt_tokens
        sequence.optional = started
        if started:  # it may have to stand back for long; its time counts from when it is waited for
            sequence.deadline = None
        request.runs[number] = run
        self.scheduler.add(sequence)
        return run

    def _begin_outside(
        self, request: Request, number: int, step: Score, record: PassRecord, started: bool
    ) -> OutsideRun:
        detector = self.outside[step.model]
        tokens, pool_from = outside_tokens(detector, step)
        text = self._outside_text(detector, record)
        text.read(0, tokens, pool_from, more=False)
        if step.timeout is not None and not started:
            text.deadline = perf_counter() + step.timeout
        record.prompt_tokens, record.started = len(tokens), request.elapsed
        request.runs[number] = run = OutsideRun(number, step, record, text, detector.spec.threshold, started)
        return run

    def _outside_text(self, detector: OutsideDetector, record: PassRecord) -> OutsideText:
        reading = detector.open()
        reading.on_done = self._told.set
        return OutsideText(reading, record)

    def _begin_answer(self, request: Request, run: Run, step: Generate) -> None:
        request.generations += 1
        run.record.candidate = step.candidate
        if step.screen is not None:
            run.screening = self._open_screen(run.sequence, step)
        leaves = step.release != "hold" and request.streaming
        # where nothing waits for what a tap says of beginnings, the text is made at the end
        screening = run.screening
        follows = screening is not None and (screening.growing or screening.eager)
        assert run.sequence.sampling is not None
        if leaves or follows or run.sequence.sampling.stop:
            detokenizer = run.sequence.model.codec.detokenizer()
            run.output = OutputText(detokenizer, run.sequence.sampling.stop)
        if step.model == request.ahead_model:
            request.ahead_model, request.ahead_tokens = None, 0

    def _open_screen(self, answer: Sequence, step: Generate) -> Screening:
        assert step.screen is not None
        detector = self.outside.get(step.screen.model)
        if detector is not None:
            if step.screen.before is None or not detector.incremental:
                raise InvalidGuard(f"{step.screen.model} runs outside the engine and cannot read along; screen=False")
            return Screening(step.screen, detector, step.release)
        model = self.model(step.screen.model)
        if model.head is None:
            raise InvalidGuard(f"{model.name} has no head to screen with")
        screening = Screening(step.screen, model, step.release)
        if step.screen.before is not None and model.invocation:
            raise InvalidGuard(
                f"{model.name} is an activated adapter, which reads a text that has ended; screen=False"
            )
        if step.screen.before is None:
            if model.backbone is not answer.model.backbone or model.adapter != answer.model.adapter:
                raise InvalidGuard(f"{model.name} reads the states of other weights than those of {step.model}")
            if model.head.spec.pooling != "mean":
                raise InvalidGuard(
                    f"{model.name} pools the last token; a head on an answer's own states pools the mean"
                )
            answer.tap, answer.pool_from = model, answer.prompt_tokens
        return screening

    def request(self, sequence: Sequence) -> Request:
        return self.requests[sequence.order[0]]

    def _run(self, sequence: Sequence) -> Run | None:
        request = self.requests.get(sequence.order[0])
        run = None if request is None else request.runs.get(sequence.order[1])
        assert not isinstance(run, OutsideRun)  # it has no sequence
        return run

    def is_under_way(self, sequence: Sequence) -> bool:
        run = self._run(sequence)
        return run is not None and any(item is sequence for item in run.sequences)

    def _end(self, request: Request, run: Run | OutsideRun) -> None:
        """Take what computes a pass away from whoever computes it, and account for it."""
        del request.runs[run.number]
        record, usage = run.record, request.usage.setdefault(run.record.model, Usage())
        if isinstance(run, OutsideRun):
            run.text.stop()
            record.finished = request.elapsed
        else:
            self._end_sequences(request, run)
        usage.prompt += record.prompt_tokens
        usage.cached += record.cached_tokens
        usage.generated += len(record.token_ids)

    def _end_sequences(self, request: Request, run: Run) -> None:
        if run.record.finished is None:
            self._end_sequence(request, run)
        if run.ahead is not None:
            self._end_ahead(request, run, run.ahead)
            request.ahead_model, request.ahead_tokens = run.ahead.model.name, run.ahead.record.computed_tokens
        reader = None if run.screening is None else run.screening.reader
        if reader is not None:
            reader.stop()
            record = reader.record
            record.finished = request.elapsed
            record.prompt_tokens = reader.num_tokens
            usage = request.usage.setdefault(record.model, Usage())
            usage.prompt += record.prompt_tokens
            usage.cached += record.cached_tokens

    def _end_sequence(self, request: Request, run: Run) -> None:
        """The pass's own sequence is over; its screen may still have to come to the end."""
        run.record.token_ids = run.sequence.tokens[run.sequence.prompt_tokens :]
        run.record.finished = request.elapsed
        if run.sequence.drafter is not None:
            run.record.drafted, run.record.accepted = run.sequence.drafter.proposed, run.sequence.drafter.accepted
        self.scheduler.remove(run.sequence)

    def _end_ahead(self, request: Request, run: Run, ahead: Sequence) -> None:
        ahead.record.finished = request.elapsed
        ahead.record.prompt_tokens = ahead.num_tokens
        self.scheduler.remove(ahead)

    def _give_up(self, request: Request, run: Run | OutsideRun) -> None:
        """End a pass that was begun early and that nobody waits for."""
        self._end(request, run)
        request.wasted += run.record.computed_tokens

    def _complete(self, request: Request, run: Run | OutsideRun, result: Any) -> None:
        """A pass is over; the loop gets its result, or error, when it waits for it."""
        self._end(request, run)
        if request.waiting_for != run.number:
            request.results[run.number] = result
        elif isinstance(result, PassError):
            self._resume(request, error=result)
        else:
            self._resume(request, result)

    def fail(self, sequence: Sequence, error: PassError) -> None:
        request, run = self.request(sequence), self._run(sequence)
        assert run is not None
        if sequence is run.sequence and run.ready is None:
            run.record.error = str(error)
            self._complete(request, run, error)
        elif sequence is run.ahead:  # nobody depends on it
            self._end_ahead(request, run, sequence)
            request.wasted += sequence.record.computed_tokens
            run.ahead = None
        else:
            self._screen_failed(request, run, error)

    def expire(self) -> None:
        """Passes past their deadline fail; their loops decide what that means."""
        late = [s for s in self.scheduler.sequences() if s.deadline is not None and perf_counter() > s.deadline]
        for sequence in late:
            if self.is_under_way(sequence):
                self.fail(sequence, PassTimeout(f"the {sequence.record.label} pass took too long"))
        for request, run, text in self._outside_texts():
            if text.deadline is not None and perf_counter() > text.deadline:
                self._outside_failed(request, run, PassTimeout(f"the {text.record.label} pass took too long"))

    # Texts outside.

    def _outside_texts(self) -> list[tuple[Request, Run | OutsideRun, OutsideText]]:
        """Those that wait for a score. Ending one may end others, which then is not seen here."""
        if not self.outside:
            return []
        found = []
        for request in self.requests.values():
            for run in request.runs.values():
                text = run.text if isinstance(run, OutsideRun) else run.screening and run.screening.reader
                if isinstance(text, OutsideText) and not text.idle:
                    found.append((request, run, text))
        return found

    def collect(self) -> None:
        """Take the scores that detectors outside have found."""
        self._told.clear()
        for request, run, text in self._outside_texts():
            if request.runs.get(run.number) is not run:  # a loop may have canceled it a moment ago
                continue
            try:
                score = text.poll()
            except Exception as error:  # it is not ours: whatever it raises, there is no score
                self._outside_failed(request, run, _pass_error(error))
                continue
            if score is None:
                continue
            if isinstance(run, OutsideRun):
                self._complete(request, run, Scored(score, run.threshold))
            else:
                self._screened(request, run, score)

    def wait(self) -> None:
        """Nothing can run: wait a moment for a detector outside, if any is asked."""
        if self._outside_texts():
            self._told.wait(_OUTSIDE_WAIT)

    def _outside_failed(self, request: Request, run: Run | OutsideRun, error: PassError) -> None:
        if request.runs.get(run.number) is not run:
            return
        if isinstance(run, OutsideRun):
            run.record.error = str(error)
            self._complete(request, run, error)
        else:
            self._screen_failed(request, run, error)

    # Batches.

    def begun(self, works: list[Work]) -> None:
        """These works are about to run."""
        for work in works:
            if work.sequence.record.started is None:
                work.sequence.record.started = self.request(work.sequence).elapsed

    def lost(self, works: list[Work], error: Exception) -> None:
        """A batch failed: so do the passes in it."""
        for work in works:
            if self.is_under_way(work.sequence):
                self.fail(work.sequence, PassError(f"{type(error).__name__}: {error}"))

    def deliver(self, lane: Lane, result: StepResult) -> None:
        """Turn a step's logits and scores into tokens and results, and resume the loops that waited for them."""
        for sequence, score in result.scores:
            if not self.is_under_way(sequence):
                continue
            request, run = self.request(sequence), self._run(sequence)
            assert run is not None and sequence.model.head is not None
            if run.screening is not None:
                self._screened(request, run, score)
            else:
                self._complete(request, run, Scored(score, sequence.model.head.spec.threshold))
        for sequence in result.closed:
            if not self.is_under_way(sequence):
                continue
            request, run = self.request(sequence), self._run(sequence)
            assert run is not None and run.screening is not None
            run.screening.judge(self.runner.tapped_score(lane, run.sequence), len(run.screening.text))
            self._end_sequence(request, run)
            self._release_or_complete(request, run)
        if result.logits is not None:
            self._choose_tokens(lane, result.works, result.logits)

    def _choose_tokens(self, lane: Lane, works: list[Work], logits: torch.Tensor) -> None:
        rows: list[SamplerRow] = []
        picked: list[int] = []
        sampling: list[tuple[Work, int]] = []  # and how many rows it has
        first = 0
        for work in works:
            sequence, count = work.sequence, 1 + len(work.drafts)
            if self.is_under_way(sequence):
                if sequence.sampling is None:
                    self._chosen(sequence, logits[first])
                else:
                    picked += range(first, first + count)
                    sampling.append((work, count))
                    for ahead in range(count):
                        seen = sequence.tokens if not ahead else [*sequence.tokens, *work.drafts[:ahead]]
                        at = sequence.num_tokens - sequence.prompt_tokens + ahead
                        rows.append(SamplerRow(sequence.sampling, seen, sequence.seed, sequence.draw, at))
            first += count
        if not rows:
            return
        chosen = iter(sample(logits if len(picked) == len(logits) else logits[picked], rows))
        for work, count in sampling:
            drawn = [next(chosen) for _ in range(count)]
            if self.is_under_way(work.sequence):  # a loop may have canceled it a moment ago
                self._sampled(lane, work, drawn)

    def _chosen(self, sequence: Sequence, logits: torch.Tensor) -> None:
        request, run = self.request(sequence), self._run(sequence)
        assert run is not None
        probs = logits.float().softmax(-1)
        self._complete(request, run, Chosen(tuple(float(probs[list(ids)].sum()) for ids in sequence.words)))

    def _sampled(self, lane: Lane, work: Work, sampled: list[Sampled | None]) -> None:
        """Append the tokens that are certain: the first, and as long as drafts came true the next."""
        sequence = work.sequence
        request, run = self.request(sequence), self._run(sequence)
        assert run is not None
        true = 0
        for index, item in enumerate(sampled):
            if item is None:
                self.fail(sequence, PassError("the model's logits are not finite numbers"))
                return
            if self._append(request, run, item):  # the last one
                self.scheduler.accept(sequence, true)
                self._answered(request, run)
                return
            if index == len(work.drafts) or item.token != work.drafts[index]:
                break
            true += 1
        if work.drafts:
            self.scheduler.accept(sequence, true)
        if sequence.drafter is not None:
            if work.drafts:
                sequence.drafter.learn(len(work.drafts), true, sequence.num_tokens)
            room = sequence.limit - sequence.num_tokens - 1
            sequence.drafts = sequence.drafter.propose(sequence.tokens, room)
        if run.screening is not None and run.output is not None:
            self._screen_more(lane, request, run)
        elif run.output is not None:
            self._release(request, run)

    def _append(self, request: Request, run: Run, sampled: Sampled) -> bool:
        """Append a token; whether it is the last one."""
        sequence, params = run.sequence, run.sequence.sampling
        assert params is not None
        token = sampled.token
        sequence.append(token)
        if params.logprobs is not None:
            sequence.sampled.append(sampled)
        if run.record.first_token is None:
            run.record.first_token = request.elapsed
        codec = sequence.model.codec
        if token in params.stop_token_ids or (token in codec.eos_ids and not params.ignore_eos):
            run.record.finish_reason = "stop"
            return True
        if run.screening is not None and run.output is not None:
            run.screening.input_characters = len(run.output.text)
            run.screening.tokens += 1
            run.screening.waiting += 1
        if run.output is not None:
            run.output.push(token)
            if run.output.stopped:
                run.record.finish_reason = "stop"
                return True
        if sequence.num_tokens >= sequence.limit:
            run.record.finish_reason = "length"
            return True
        return False

    def _answered(self, request: Request, run: Run, early: bool = False) -> None:
        """The answer is decoded, or not worth decoding further; a screen may have to read its end."""
        sequence, step = run.sequence, run.step
        assert isinstance(step, Generate)
        ids = tuple(sequence.tokens[sequence.prompt_tokens :])
        # by a token that is no part of the text
        ended = run.record.finish_reason == "stop" and not (run.output is not None and run.output.stopped)
        if run.output is None:
            text = sequence.model.codec.decode(ids[:-1] if ended else ids)
        else:
            run.output.flush()
            text = run.output.text
        run.record.text = text
        if sequence.sampled:
            request.sampled[ids] = sequence.sampled
        stream = Stream(
            sequence.model.name,
            sequence.model.backbone.cache_key,
            tuple(sequence.tokens),
            tuple(sequence.plain_content),
            sequence.images,
            sequence.prompt_tokens,
            step.label,
        )
        reason = run.record.finish_reason or "stop"
        run.ready = Answer(text, ids, None, early, reason, stream)
        screening = run.screening
        if screening is None or early:
            self._end_sequence(request, run)
            self._release_or_complete(request, run)
            return
        screening.text = text
        screening.ended = request.elapsed
        screening.closed = True
        if screening.screen.before is not None:
            self._end_sequence(request, run)
            self._feed(request, run)
        elif ended:  # every token of the text was an input already
            lane = self.scheduler.lane(sequence.model.backbone)
            screening.judge(self.runner.tapped_score(lane, sequence), len(text))
            self._end_sequence(request, run)
            self._release_or_complete(request, run)
        else:
            sequence.closing = True
            if screening.screen.timeout is not None:
                sequence.deadline = perf_counter() + screening.screen.timeout

    # Screens.

    def _screen_more(self, lane: Lane, request: Request, run: Run) -> None:
        """Hand new text to the screen where that is worth a chunk, or ask a tap."""
        screening, step = run.screening, run.step
        assert screening is not None and run.output is not None and isinstance(step, Generate)
        screening.text = run.output.text
        if screening.error is None:
            if screening.screen.before is None:
                every = screening.screen.chunk or TAP_EVERY
                if screening.waiting >= every and screening.eager:
                    screening.waiting = 0
                    screening.judge(self.runner.tapped_score(lane, run.sequence), screening.input_characters)
                    self._judged(request, run)
                    return
            elif screening.idle and self._is_worth_a_chunk(lane, screening):
                if isinstance(screening.model, Model):
                    lane.spare_rows -= screening.waiting
                self._feed(request, run)
        if run.number in request.runs:
            self._release(request, run)

    def _is_worth_a_chunk(self, lane: Lane, screening: Screening) -> bool:
        """Whether the detector should read what is new. Where it shares the answer's weights, in rows that cost
        nothing, as long as there are some; otherwise when reading its weights pays, the later the more answers are
        decoded. Outside it takes no time from the answer, and gets a chunk when it is done with the last."""
        new, free = screening.waiting, lane.free_rows
        if screening.screen.chunk is not None:
            return new >= screening.screen.chunk
        if not isinstance(screening.model, Model):
            return new >= EAGER * free
        if screening.model.backbone is lane.backbone:
            return free // 2 <= new <= lane.spare_rows or new >= 4 * free
        return new >= free * (EAGER if screening.eager else PATIENT) * (1 + lane.decoding // 8)

    def _feed(self, request: Request, run: Run) -> None:
        """Give the screen's reader the tokens of the new text."""
        screening = run.screening
        assert screening is not None

        def new(ids: Many[int]) -> Reader:
            record = PassRecord("screen", screening.screen.model, submitted=request.elapsed)
            request.passes.append(record)
            if not isinstance(screening.model, Model):
                record.started = record.submitted
                return self._outside_text(screening.model, record)
            sequence = self._beside(request, run, 1, screening.model, ids, record)
            sequence.scored, sequence.optional = True, run.started
            room = run.sequence.limit - run.sequence.prompt_tokens
            sequence.limit = min(screening.model.context, len(ids) + room)
            self.scheduler.check_fits(sequence.table.layout, sequence.num_tokens)
            self.scheduler.add(sequence)
            return InLane(sequence, self.scheduler)

        began = perf_counter()
        try:
            screening.follow(new)
        except Exception as error:
            self._screen_failed(request, run, error)
            return
        finally:
            request.overhead += perf_counter() - began
        if run.ready is not None and screening.done:
            self._release_or_complete(request, run)

    def _beside(
        self, request: Request, run: Run, part: int, model: Model, ids: Many[int], record: PassRecord
    ) -> Sequence:
        """A further sequence of a pass. Raises `BadInput` where it would have no token."""
        if not ids:
            raise BadInput(f"the {record.label} pass has an empty prompt")
        who = Identity(request.id, run.number, part, 0, request.seed, request.salt)
        tokens = list(ids)
        sequence = new_sequence(model, who, Encoded(tokens, tokens, ()), record, self.pool, self._page_size)
        if model.invocation:  # which stands behind the last token, and is not there yet
            sequence.adapted_from, sequence.content = None, tokens
        return sequence

    def _screened(self, request: Request, run: Run, score: float) -> None:
        assert run.screening is not None
        run.screening.judge(score)
        self._judged(request, run)

    def _judged(self, request: Request, run: Run) -> None:
        """A beginning, or all, of an answer has a score."""
        screening, step = run.screening, run.step
        assert screening is not None and isinstance(step, Generate)
        if run.ready is not None:
            if not screening.done:  # the score of an earlier chunk; the last one is on its way
                return
            self._release_or_complete(request, run)
        elif screening.doomed:
            self._answered(request, run, early=True)
        else:
            if step.ahead is not None and screening.harmful and len(screening.text) >= run.ahead_from:
                run.ahead_from = len(screening.text) * 5 // 4  # in all it costs a few times the last prompt
                self._run_ahead(request, run, step.ahead)
            self._release(request, run)

    def _screen_failed(self, request: Request, run: Run, error: Exception) -> None:
        screening = run.screening
        assert screening is not None
        screening.fail(error)
        if screening.reader is not None:
            screening.reader.record.error = str(error) or type(error).__name__
            screening.reader.stop()
        if run.ready is not None:
            self._release_or_complete(request, run)
        elif screening.doomed:
            self._answered(request, run, early=True)

    def _release(self, request: Request, run: Run) -> None:
        """Show what may be shown of an answer that is still decoded."""
        step = run.step
        assert isinstance(step, Generate) and run.output is not None
        if run.started:
            return
        text = run.output.text
        cleared = 0 if run.screening is None else run.screening.cleared
        if step.release == "live":
            request.show(text)
        elif step.release == "audit":
            request.show(text, cleared)
        elif step.release == "window":
            request.show(text[:cleared], cleared)

    def _release_or_complete(self, request: Request, run: Run) -> None:
        """The answer and all that is known of it go to the loop."""
        assert run.ready is not None
        screening, step = run.screening, run.step
        answer = run.ready
        if screening is not None:
            answer = answer._replace(screened=screening.result)
            if screening.ended is not None:
                request.exposed += request.elapsed - screening.ended
        if run.output is not None and isinstance(step, Generate) and step.release in ("live", "audit"):
            self._release(request, run)
        self._complete(request, run, answer)

    def _run_ahead(self, request: Request, run: Run, ahead: Ahead) -> None:
        """Compute what is known of the prompt that will follow a harmful answer."""
        screening = run.screening
        assert screening is not None
        began = perf_counter()
        try:
            model = self.model(ahead.model)
            tokens = _common([encode(model, ahead.prompt(screening.text + more)).tokens for more in ("", "\n~")])
            if max(tokens, default=0) >= model.backbone.decoder.config.vocab_size:
                raise BadInput(f"{model.name} has no weights for token {max(tokens)}")
            if run.ahead is None:
                record = PassRecord("ahead", model.name, submitted=request.elapsed)
                run.ahead = self._beside(request, run, 2, model, tokens, record)
                run.ahead.optional = run.ahead.open = True
                self.scheduler.check_fits(run.ahead.table.layout, len(tokens))
                self.scheduler.add(run.ahead)
            else:
                self.scheduler.replace_tail(run.ahead, len(_common([run.ahead.tokens, tokens])), tokens)
        except Exception:  # what is only hoped for may fail: the pass itself will say why
            if run.ahead is not None:
                self._end_ahead(request, run, run.ahead)
                request.wasted += run.ahead.record.computed_tokens
                run.ahead = None
        request.overhead += perf_counter() - began


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


def _pass_error(error: Exception) -> PassError:
    """What a loop is told when a pass could not begin: a tokenizer or an image processor fails as it likes."""
    if isinstance(error, PassError):
        return error
    if isinstance(error, PromptTooLong):
        return TooLong(str(error))
    return PassError(str(error) if isinstance(error, StockadeError) else f"{type(error).__name__}: {error}")


def _common(many: list[list[int]]) -> list[int]:
    """The longest common beginning."""
    count = 0
    for items in zip(*many, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return many[0][:count]
