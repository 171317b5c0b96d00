"""What holds for every pass of a guard's loop, whoever asks for it. It decides nothing about texts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..passes import Answer, Ask, Cancel, Generate, Handle, Loop, Screen, Start, Wait
from .detectors import MLLM


@dataclass
class Watch:
    """Stands between a loop and the engine.

    A remedy's text that may be shown is screened like the first answer, wherever the detector can; whatever was
    started is waited for or canceled before the loop ends. screen: for those texts. made: the last answer that a
    `Generate` gave. running: passes that were started and not settled yet.
    """

    screen: Screen | None
    made: Answer | None = None
    running: list[Handle] = field(default_factory=list)

    def over(self, loop: Loop) -> Loop:
        """The loop, watched. Closing it from outside leaves what it has started to who closed it."""
        try:
            decision = yield from self._relay(loop)
        except Exception:
            yield from self._cancel()
            raise
        yield from self._cancel()
        return decision

    def vouched(self, answer: Answer) -> Answer:
        """A remedy's answer with what is known of its text, and of that only: a remedy may have changed the text of a
        pass, or have made one up."""
        made = self.made
        if made is None or made.text != answer.text:
            return answer._replace(screened=None, stream=None)
        return answer._replace(screened=made.screened, stream=made.stream, stopped_early=made.stopped_early)

    def _relay(self, loop: Loop) -> Loop:
        reply: Any = None
        error: Exception | None = None
        try:
            while True:
                ask = self._asked(loop.send(reply) if error is None else loop.throw(error))
                reply = error = None
                try:
                    reply = yield ask
                except Exception as failure:
                    error = failure
                else:
                    self._got(ask, reply)
        except StopIteration as stop:
            return stop.value
        finally:
            loop.close()

    def _asked(self, ask: Ask) -> Ask:
        if isinstance(ask, Wait | Cancel) and ask.handle in self.running:
            self.running.remove(ask.handle)
        if self.screen is None or not isinstance(ask, Generate) or not ask.candidate or ask.screen is not None:
            return ask
        if self.screen.before is None and ask.model != MLLM:  # it has other hidden states
            return ask
        return replace(ask, screen=self.screen)

    def _got(self, ask: Ask, result: Any) -> None:
        if isinstance(ask, Start) and isinstance(result, Handle):
            self.running.append(result)
        if isinstance(ask, Generate) and isinstance(result, Answer):
            self.made = result

    def _cancel(self) -> Any:
        while self.running:
            yield Cancel(self.running.pop())
