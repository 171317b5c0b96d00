"""Rewrites that mostly copy: how many steps drafts from the original save, on target texts that are forced.

A model that rewrites well is not needed for that: the runner's logits are raised for the target's next token, so
that proposal, verification and acceptance are the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

import torch

from ..engine.chat import Chat
from ..engine.engine import Engine
from ..engine.guards import Detoxify
from ..engine.guards.detectors import bound
from ..engine.models.loader import ModelSet
from ..engine.passes import Answer, Decision, Loop, ModelTraits, ReleaseMode
from ..engine.request import Outcome
from ..engine.runner import ModelRunner, StepResult
from ..engine.sampling import SamplingParams
from ..engine.scheduler import Lane, Work
from .estimates import Estimate
from .report import WrongPath
from .workload import question

_BIAS = 1e4  # above any logit
_SPAN = 8  # tokens that are changed together: a phrase


class ForcedRunner(ModelRunner):
    """A runner whose logits say the next token of `target`, for the one pass that runs. It computes all the same.

    steps: that it ran so far.
    """

    def __init__(self, engine: Engine, feature_bytes: int = 1 << 20) -> None:
        super().__init__(engine.pool, engine.lanes, {}, feature_bytes)  # for no model it chooses tokens on the device
        self.target: list[int] = []
        self.steps = 0

    @torch.inference_mode()
    def run(self, lane: Lane, works: list[Work]) -> StepResult:
        result = super().run(lane, works)
        self.steps += 1
        for work in result.works:
            assert result.logits is not None
            said = work.sequence.num_tokens - work.sequence.prompt_tokens
            for row, token in enumerate(self.target[said : said + 1 + len(work.drafts)]):
                result.logits[row, token] += _BIAS
        return result


class RewriteReport(NamedTuple):
    """kept: share of the original's tokens that a target keeps. plain, drafted: steps of a rewrite; ratio: of pairs.
    seconds: the same of the whole rewrite. accepted: share of the guessed tokens that came true."""

    tokens: int
    kept: float
    plain: Estimate
    drafted: Estimate
    ratio: Estimate
    seconds_ratio: Estimate
    accepted: Estimate

    @classmethod
    def of(cls, values: Sequence[Any]) -> RewriteReport:
        """A report from its values, which may have been JSON meanwhile."""
        tokens, kept, *estimates = values
        return cls(tokens, kept, *(Estimate(*estimate) for estimate in estimates))

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "kept_percent": round(100.0 * self.kept, 1),
            "steps": self.plain.to_dict(),
            "steps_with_drafts": self.drafted.to_dict(),
            "times_fewer_steps": self.ratio.to_dict(),
            "times_faster": self.seconds_ratio.to_dict(),
            "accepted_percent": self.accepted.scaled(100.0).to_dict(),
        }


@dataclass(frozen=True)
class MendOnly:
    """No guard: its remedy alone, on a given text."""

    remedy: Detoxify
    text: str

    def run(self, chat: Chat, traits: Mapping[str, ModelTraits], release: ReleaseMode = "verdict") -> Loop:
        answer = yield from bound(self.remedy, traits).mend(chat, Answer(self.text))
        return Decision(answer, Outcome.UNGUARDED)


class _Rewritten(NamedTuple):
    steps: int
    seconds: float
    accepted: float


@dataclass(frozen=True)
class RewriteConfig:
    """keep: least share of the original's tokens that a target keeps, in their order. repeats: target texts."""

    tokens: int = 128
    keep: float = 0.6
    repeats: int = 10
    seed: int = 0
    drafts: int = field(default=Detoxify().draft_tokens or 0)


def run_rewrites(engine: Engine, config: RewriteConfig) -> RewriteReport:
    """Rewrite original answers into forced targets, once with drafts and once without, in random order.

    The detoxifier of `engine` gives both texts. Raises `WrongPath` where a rewrite is not its target.
    """
    detoxifier = engine.models["detoxifier"]
    dtype = detoxifier.backbone.decoder.dtype
    models = ModelSet({"mllm": replace(detoxifier, name="mllm")}, engine.device, dtype)
    forced = Engine(models=models, kv_bytes=256 << 20)
    runner = ForcedRunner(forced)
    forced.runner = forced.driver.runner = runner
    random = Random(config.seed)
    tokenizer = detoxifier.codec.tokenizer
    rows: list[tuple[_Rewritten, _Rewritten]] = []
    kept: list[float] = []
    for _ in range(config.repeats + 1):  # the first one warms up
        original = _ids(tokenizer, config.tokens, random)
        target, share = edited(original, _ids(tokenizer, config.tokens, random), config.keep, random)
        both = {}
        for drafts in random.sample((0, config.drafts), 2):
            both[drafts] = _rewrite(forced, runner, original, target, drafts)
        rows.append((both[0], both[config.drafts]))
        kept.append(share)
    rows = rows[1:]
    return RewriteReport(
        config.tokens,
        min(kept[1:]),
        Estimate.of(plain.steps for plain, _ in rows),
        Estimate.of(drafted.steps for _, drafted in rows),
        Estimate.of(plain.steps / drafted.steps for plain, drafted in rows),
        Estimate.of(plain.seconds / drafted.seconds for plain, drafted in rows),
        Estimate.of(drafted.accepted for _, drafted in rows),
    )


def edited(original: list[int], other: list[int], keep: float, random: Random) -> tuple[list[int], float]:
    """The original with whole phrases replaced by those of `other`, as long as a share of `keep` or more of its
    tokens stays; and that share. Both have the same length."""
    target = list(original)
    spans = list(range(0, len(original), _SPAN))
    room = int((1.0 - keep) * len(original))
    changed = 0
    for start in random.sample(spans, len(spans)):
        size = min(_SPAN, len(original) - start)
        if changed + size > room:
            break
        target[start : start + size] = other[start : start + size]
        changed += size
    return target, 1.0 - changed / len(original)


def _ids(tokenizer: Any, tokens: int, random: Random) -> list[int]:
    """Token ids of ordinary text that are those of their own text again."""
    while True:
        text = question(tokenizer, tokens + 8, random)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        if len(ids) == tokens:
            return ids


def _rewrite(engine: Engine, runner: ForcedRunner, original: list[int], target: list[int], drafts: int) -> _Rewritten:
    engine.pool.clear_cache()
    sampling = SamplingParams(max_tokens=len(original), ignore_eos=True)
    text = engine.models["mllm"].codec.decode(original)
    mend = MendOnly(Detoxify("mllm", chat_template=False, sampling=sampling, draft_tokens=drafts), text)
    runner.target, runner.steps = target, 0
    (reply,) = engine.chat(["?"], guard=mend)
    last = reply.passes[-1]
    if last.label != "rewrite" or last.token_ids != target:
        raise WrongPath(f"a forced rewrite ended as {last.label} ({last.error}), or is not its target")
    accepted = last.accepted / last.drafted if last.drafted else 0.0
    return _Rewritten(runner.steps, last.seconds, accepted)
