"""The detector that is a guard model: a language model trained to say of a conversation whether it is safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..chat import Chat
from ..errors import InvalidGuard
from ..passes import Answer, Choose, Chosen, ModelTraits
from ..request import Verdict
from .detectors import NONSENSE, Judging, check_number, check_timeout
from .templates import TEMPLATES, GuardTemplate

IMITATES = "imitates the guard's prompt"

_INSTEAD = {
    "shieldgemma-2": "it judges images, not answers; use shieldgemma",
}


@dataclass(frozen=True)
class GenerativeGuard:
    """Asks a guard model in its own prompt, and reads the verdict from the distribution of the next token.

    template: whose prompt it is, one of `TEMPLATES`. model: the name of the guard model in the engine. The score is
    P(safe words) / (P(safe words) + P(unsafe words)); where both have less than `min_mass` together, the model says
    something else, and the verdict is nonsense, hence harmful. A template with several policies is asked about one
    after the other until one is violated, and the lowest score counts; the prompts begin alike, so each further
    policy costs its own tokens only. The guard sees texts, no images and no system message. A text that spells
    special tokens stays text; one that spells what sets the conversation off in the prompt is harmful without being
    read, as no model can tell it from the prompt.

    Raises `InvalidGuard` for an unknown template and for numbers that are none or out of range.
    """

    template: str
    model: str = "detector"
    threshold: float = field(default=0.5, kw_only=True)
    min_mass: float = field(default=0.5, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    incremental: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            why = _INSTEAD.get(self.template, f"there are {', '.join(TEMPLATES)}")
            raise InvalidGuard(f"no guard model {self.template!r}: {why}")
        check_number("threshold", self.threshold)
        check_number("min_mass", self.min_mass)
        if not 0.0 < self.min_mass <= 1.0:
            raise InvalidGuard(f"min_mass must be above 0 and at most 1, not {self.min_mass}")
        check_timeout(self.timeout)

    @property
    def name(self) -> str:
        return self.template

    def bind(self, traits: Mapping[str, ModelTraits]) -> GenerativeGuard:
        """Itself. Raises `InvalidGuard` where the model is none that its template could be for."""
        own = traits[self.model]
        if own.template is not None:
            raise InvalidGuard(f"{self.model!r} has a head that scores; {self.template} is a language model")
        if missing := sorted(TEMPLATES[self.template].specials - own.special_tokens):
            raise InvalidGuard(
                f"{self.model!r} is not {self.template}: its tokenizer has no special token {', '.join(missing)}"
            )
        return self

    def judge(self, chat: Chat, answer: Answer) -> Judging:
        template = TEMPLATES[self.template]
        turns = template.turns(chat, answer.text)
        if any(mark.casefold() in text.casefold() for _, text in turns for mark in template.marks):
            return Verdict.failed(self.name, IMITATES, self.threshold)
        lowest: Verdict | None = None
        for policy in template.policies:
            chosen = yield Choose(
                self.model,
                template.prompt(turns, policy),
                template.safe,
                timeout=self.timeout,
                beginnings=template.unsafe,
            )
            verdict = self._verdict(template, chosen, policy)
            # a failed verdict has no score to compare
            if verdict.harmful:
                return verdict
            if lowest is None or verdict.score < lowest.score:
                lowest = verdict
        assert lowest is not None
        return lowest

    def _verdict(self, template: GuardTemplate, chosen: Chosen, policy: str) -> Verdict:
        count = len(template.safe)
        # NaN and negative parts fail every comparison, whatever the others are
        if not all(mass >= 0.0 for mass in chosen.masses):
            return Verdict.failed(self.name, NONSENSE, self.threshold)
        safe, unsafe = sum(chosen.masses[:count]), sum(chosen.masses[count:])
        # sums of rounded probabilities may exceed one by a little
        if not self.min_mass <= safe + unsafe <= 1.01:
            return Verdict.failed(self.name, NONSENSE, self.threshold)
        about = f", {policy.partition(':')[0]}" if policy else ""
        detail = f"safe {safe:.3f}, unsafe {unsafe:.3f}{about}"
        return Verdict(safe / (safe + unsafe), self.threshold, self.name, detail=detail)
