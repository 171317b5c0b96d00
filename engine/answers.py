"""Answers while they are decoded: their tokens, the screens that read along, what may be shown of them, and what is
begun beside them.

Requests, loops and all other passes are the driver's.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from collections.abc import Set
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from .errors import BadInput, InvalidGuard, PassError
from .models.model import Model
from .output import OutputText
from .passes import Ahead, Answer, Chosen, Generate, Stream
from .prepare import Encoded, Identity, encode, new_sequence
from .request import PassRecord
from .running import Request, Run
from .sampling import Sampled, SamplerRow, sample
from .scheduler import Lane, Work
from .screening import InLane, Reader, Screening
from .sequence import Sequence

if TYPE_CHECKING:
    from .driver import Driver

# What a detector with weights of its own reads at a time, in free rows of a lane: as little as pays where something
# waits for it; otherwise so much that reading its weights is at most half of the work.
EAGER, PATIENT = 2, 8
TAP_EVERY = 8  # tokens between two scores of a head on an answer's own states, where anything depends on them


class Answers:
    """What becomes of the `Generate` passes of a driver. They are over when the driver is told so."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def begin(self, request: Request, run: Run, step: Generate) -> None:
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
        detector = self._driver.outside.get(step.screen.model)
        if detector is not None:
            if step.screen.before is None or not detector.incremental:
                raise InvalidGuard(f"{step.screen.model} runs outside the engine and cannot read along; screen=False")
            return Screening(step.screen, detector, step.release)
        model = self._driver.model(step.screen.model)
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

    def take_tokens(self, lane: Lane, works: list[Work], ids: list[int], dropped: Set[Sequence]) -> None:
        """The tokens that the device chose; -1 where the logits are no numbers. dropped: as of `choose_tokens`."""
        for work, token in zip(works, ids, strict=True):
            if self._driver.is_under_way(work.sequence) and work.sequence not in dropped:
                self._sampled(lane, work, [Sampled(token) if token >= 0 else None])

    def choose_tokens(
        self, lane: Lane, works: list[Work], logits: torch.Tensor, dropped: Set[Sequence] = frozenset()
    ) -> None:
        """logits: as of a `StepResult`. dropped: sequences whose rows are not read."""
        rows: list[SamplerRow] = []
        picked: list[int] = []
        sampling: list[tuple[Work, int]] = []  # and how many rows it has
        first = 0
        for work in works:
            sequence, count = work.sequence, 1 + len(work.drafts)
            if self._driver.is_under_way(sequence) and sequence not in dropped:
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
            if self._driver.is_under_way(work.sequence):  # a loop may have canceled it a moment ago
                self._sampled(lane, work, drawn)

    def _chosen(self, sequence: Sequence, logits: torch.Tensor) -> None:
        request, run = self._driver.request(sequence), self._driver.run_of(sequence)
        assert run is not None
        probs = logits.float().softmax(-1)
        self._driver.complete(request, run, Chosen(tuple(float(probs[list(ids)].sum()) for ids in sequence.words)))

    def _sampled(self, lane: Lane, work: Work, sampled: list[Sampled | None]) -> None:
        """Append the tokens that are certain: the first, and as long as drafts came true the next."""
        sequence = work.sequence
        request, run = self._driver.request(sequence), self._driver.run_of(sequence)
        assert run is not None
        true = 0
        for index, item in enumerate(sampled):
            if item is None:
                self._driver.fail(sequence, PassError("the model's logits are not finite numbers"))
                return
            if self._append(request, run, item):  # the last one
                self._driver.scheduler.accept(sequence, true)
                self._answered(request, run)
                return
            if index == len(work.drafts) or item.token != work.drafts[index]:
                break
            true += 1
        if work.drafts:
            self._driver.scheduler.accept(sequence, true)
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
            self._driver.end_sequence(request, run)
            self.release_or_complete(request, run)
            return
        screening.text = text
        screening.ended = request.elapsed
        screening.closed = True
        if screening.screen.before is not None:
            self._driver.end_sequence(request, run)
            self._feed(request, run)
        elif ended:  # every token of the text was an input already
            lane = self._driver.scheduler.lane(sequence.model.backbone)
            screening.judge(self._driver.runner.tapped_score(lane, sequence), len(text))
            self._driver.end_sequence(request, run)
            self.release_or_complete(request, run)
        else:
            sequence.closing = True
            if screening.screen.timeout is not None:
                sequence.deadline = perf_counter() + screening.screen.timeout

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
                    screening.judge(self._driver.runner.tapped_score(lane, run.sequence), screening.input_characters)
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
                return self._driver.outside_text(screening.model, record)
            sequence = self._beside(request, run, 1, screening.model, ids, record)
            sequence.scored, sequence.optional = True, run.started
            room = run.sequence.limit - run.sequence.prompt_tokens
            sequence.limit = min(screening.model.context, len(ids) + room)
            self._driver.scheduler.check_fits(sequence.table.layout, sequence.num_tokens)
            self._driver.scheduler.add(sequence)
            return InLane(sequence, self._driver.scheduler)

        began = perf_counter()
        try:
            screening.follow(new)
        except Exception as error:
            self.screen_failed(request, run, error)
            return
        finally:
            request.overhead += perf_counter() - began
        if run.ready is not None and screening.done:
            self.release_or_complete(request, run)

    def _beside(
        self, request: Request, run: Run, part: int, model: Model, ids: Many[int], record: PassRecord
    ) -> Sequence:
        """A further sequence of a pass. Raises `BadInput` where it would have no token."""
        if not ids:
            raise BadInput(f"the {record.label} pass has an empty prompt")
        who = Identity(request.id, run.number, part, 0, request.seed, request.salt)
        tokens = list(ids)
        sequence = new_sequence(
            model, who, Encoded(tokens, tokens, ()), record, self._driver.pool, self._driver.page_size
        )
        if model.invocation:  # which stands behind the last token, and is not there yet
            sequence.adapted_from, sequence.content = None, tokens
        return sequence

    def screened(self, request: Request, run: Run, score: float) -> None:
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
            self.release_or_complete(request, run)
        elif screening.doomed:
            self._answered(request, run, early=True)
        else:
            if step.ahead is not None and screening.harmful and len(screening.text) >= run.ahead_from:
                run.ahead_from = len(screening.text) * 5 // 4  # in all it costs a few times the last prompt
                self._run_ahead(request, run, step.ahead)
            self._release(request, run)

    def screen_failed(self, request: Request, run: Run, error: Exception) -> None:
        screening = run.screening
        assert screening is not None
        screening.fail(error)
        if screening.reader is not None:
            screening.reader.record.error = str(error) or type(error).__name__
            screening.reader.stop()
        if run.ready is not None:
            self.release_or_complete(request, run)
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

    def release_or_complete(self, request: Request, run: Run) -> None:
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
        self._driver.complete(request, run, answer)

    def _run_ahead(self, request: Request, run: Run, ahead: Ahead) -> None:
        """Compute what is known of the prompt that will follow a harmful answer."""
        screening = run.screening
        assert screening is not None
        began = perf_counter()
        try:
            model = self._driver.model(ahead.model)
            tokens = _common([encode(model, ahead.prompt(screening.text + more)).tokens for more in ("", "\n~")])
            if max(tokens, default=0) >= model.backbone.decoder.config.vocab_size:
                raise BadInput(f"{model.name} has no weights for token {max(tokens)}")
            if run.ahead is None:
                record = PassRecord("ahead", model.name, submitted=request.elapsed)
                run.ahead = self._beside(request, run, 2, model, tokens, record)
                run.ahead.optional = run.ahead.open = True
                self._driver.scheduler.check_fits(run.ahead.table.layout, len(tokens))
                self._driver.scheduler.add(run.ahead)
            else:
                self._driver.scheduler.replace_tail(run.ahead, len(_common([run.ahead.tokens, tokens])), tokens)
        except Exception:  # what is only hoped for may fail: the pass itself will say why
            if run.ahead is not None:
                self._driver.end_ahead(request, run, run.ahead)
                request.wasted += run.ahead.record.computed_tokens
                run.ahead = None
        request.overhead += perf_counter() - began


def _common(many: list[list[int]]) -> list[int]:
    """The longest common beginning."""
    count = 0
    for items in zip(*many, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return many[0][:count]
