"""Drives the loops of requests: begins the passes they ask for, sends results back in, turns decisions into replies.

It says what has to be computed; when that happens is the scheduler's business, how the runner's. What becomes of an
answer while it is decoded has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from threading import Event
from time import perf_counter
from typing import Any

from .answers import Answers
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
from .outside import OutsideDetector, OutsideText
from .passes import (
    Answer,
    Ask,
    Cancel,
    Choose,
    Decision,
    Generate,
    Handle,
    Loop,
    Pass,
    Score,
    Scored,
    Start,
    Wait,
)
from .prepare import Identity, make_sequence, outside_tokens
from .request import FinishReason, Outcome, PassRecord, Reply, Usage
from .runner import ModelRunner, StepResult
from .running import OutsideRun, Request, Run
from .sampling import SamplingParams
from .scheduler import Lane, Scheduler, Work
from .sequence import Sequence

_OUTSIDE_WAIT = 0.005  # seconds that a step without work waits for a detector outside


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
        self.page_size = page_size
        self._next_id = 0
        self.answers = Answers(self)
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
            sequence = make_sequence(step, model, who, sampling, record, self.pool, self.page_size)
            self.scheduler.check_fits(sequence.table.layout, sequence.limit)
            run = Run(number, step, record, sequence, started=started)
            if isinstance(step, Generate):
                self.answers.begin(request, run, step)
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
        text = self.outside_text(detector, record)
        text.read(0, tokens, pool_from, more=False)
        if step.timeout is not None and not started:
            text.deadline = perf_counter() + step.timeout
        record.prompt_tokens, record.started = len(tokens), request.elapsed
        request.runs[number] = run = OutsideRun(number, step, record, text, detector.spec.threshold, started)
        return run

    def outside_text(self, detector: OutsideDetector, record: PassRecord) -> OutsideText:
        reading = detector.open()
        reading.on_done = self._told.set
        return OutsideText(reading, record)

    def request(self, sequence: Sequence) -> Request:
        return self.requests[sequence.order[0]]

    def run_of(self, sequence: Sequence) -> Run | None:
        request = self.requests.get(sequence.order[0])
        run = None if request is None else request.runs.get(sequence.order[1])
        assert not isinstance(run, OutsideRun)  # it has no sequence
        return run

    def is_under_way(self, sequence: Sequence) -> bool:
        run = self.run_of(sequence)
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
            self.end_sequence(request, run)
        if run.ahead is not None:
            self.end_ahead(request, run, run.ahead)
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

    def end_sequence(self, request: Request, run: Run) -> None:
        """The pass's own sequence is over; its screen may still have to come to the end."""
        run.record.token_ids = run.sequence.tokens[run.sequence.prompt_tokens :]
        run.record.finished = request.elapsed
        if run.sequence.drafter is not None:
            run.record.drafted, run.record.accepted = run.sequence.drafter.proposed, run.sequence.drafter.accepted
        self.scheduler.remove(run.sequence)

    def end_ahead(self, request: Request, run: Run, ahead: Sequence) -> None:
        ahead.record.finished = request.elapsed
        ahead.record.prompt_tokens = ahead.num_tokens
        self.scheduler.remove(ahead)

    def _give_up(self, request: Request, run: Run | OutsideRun) -> None:
        """End a pass that was begun early and that nobody waits for."""
        self._end(request, run)
        request.wasted += run.record.computed_tokens

    def complete(self, request: Request, run: Run | OutsideRun, result: Any) -> None:
        """A pass is over; the loop gets its result, or error, when it waits for it."""
        self._end(request, run)
        if request.waiting_for != run.number:
            request.results[run.number] = result
        elif isinstance(result, PassError):
            self._resume(request, error=result)
        else:
            self._resume(request, result)

    def fail(self, sequence: Sequence, error: PassError) -> None:
        request, run = self.request(sequence), self.run_of(sequence)
        assert run is not None
        if sequence is run.sequence and run.ready is None:
            run.record.error = str(error)
            self.complete(request, run, error)
        elif sequence is run.ahead:  # nobody depends on it
            self.end_ahead(request, run, sequence)
            request.wasted += sequence.record.computed_tokens
            run.ahead = None
        else:
            self.answers.screen_failed(request, run, error)

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
                self.complete(request, run, Scored(score, run.threshold))
            else:
                self.answers.screened(request, run, score)

    def wait(self) -> None:
        """Nothing can run: wait a moment for a detector outside, if any is asked."""
        if self._outside_texts():
            self._told.wait(_OUTSIDE_WAIT)

    def _outside_failed(self, request: Request, run: Run | OutsideRun, error: PassError) -> None:
        if request.runs.get(run.number) is not run:
            return
        if isinstance(run, OutsideRun):
            run.record.error = str(error)
            self.complete(request, run, error)
        else:
            self.answers.screen_failed(request, run, error)

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

    def deliver(self, lane: Lane, result: StepResult, dropped: Set[Sequence] = frozenset()) -> None:
        """Turn a step's logits and scores into tokens and results, and resume the loops that waited for them.

        dropped: sequences that were cut or preempted meanwhile, for which it says nothing.
        """
        for sequence, score in result.scores:
            # where more is known by now, it is no score of what was handed to the head last
            if not self.is_under_way(sequence) or sequence in dropped or sequence.remaining:
                continue
            request, run = self.request(sequence), self.run_of(sequence)
            assert run is not None and sequence.model.head is not None
            if run.screening is not None:
                self.answers.screened(request, run, score)
            else:
                self.complete(request, run, Scored(score, sequence.model.head.spec.threshold))
        for sequence in result.closed:
            if not self.is_under_way(sequence) or sequence in dropped:
                continue
            request, run = self.request(sequence), self.run_of(sequence)
            assert run is not None and run.screening is not None
            run.screening.judge(self.runner.tapped_score(lane, run.sequence), len(run.screening.text))
            self.end_sequence(request, run)
            self.answers.release_or_complete(request, run)
        if result.ids is not None:
            self.answers.take_tokens(lane, result.works, result.ids.tolist(), dropped)
        elif result.logits is not None:
            self.answers.choose_tokens(lane, result.works, result.logits, dropped)


def _attach_verdicts(passes: list[PassRecord], decision: Decision) -> None:
    """Give each verdict to the pass whose text it judged: verdicts come in the order of the answers, the first of
    which may have come from elsewhere."""
    answers = [record for record in passes if record.candidate and record.error is None]
    for record, judged in zip(answers, decision.judged[max(0, len(decision.judged) - len(answers)) :], strict=False):
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
