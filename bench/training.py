"""A detector's training step against a plain PyTorch loop of the same model, LoRA, optimizer and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from random import Random
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..engine.models.sources import BUNDLES
from ..train.backbone import adapt, open_backbone, trainable
from ..train.batches import epoch_batches, padded
from ..train.detector import HarmModel, LogitHead
from ..train.losses import harm_loss
from ..train.readings import Reading
from ..train.recipe import Recipe
from .overhead_report import Goal
from .paired import Contest, Enough, Round, interval, play, shortfall, take_turns
from .report import Spread
from .units import Unit
from .workload import Sources

SIDES = ("stockade", "plain PyTorch")
LEAST = 0.8  # of the plain loop's tokens/s, is what a step of ours is to reach


@dataclass(frozen=True)
class TrainingConfig:
    """answers: random ones of `shortest` to `longest` tokens, all of them trained on by both sides in each round."""

    answers: int = 64
    batch: int = 8
    shortest: int = 16
    longest: int = 256
    layers: int | None = None
    enough: Enough = field(default_factory=lambda: Enough(least=3))
    seed: int = 0


class TrainingPlan:
    """A piece of work is one round: both sides take a step for each batch, in turn. Each batches the answers in its
    own way, to the same size."""

    kind = "training"

    def __init__(self, sources: Sources, config: TrainingConfig, dtype: torch.dtype | None = None) -> None:
        self.config, self.seed, self.limit = config, config.seed, config.enough.limit
        dtype = dtype or torch.float32
        self.settings = {"model": sources.name, "dtype": str(dtype).removeprefix("torch."), **asdict(config)}
        base = sources.model if str(sources.model) in BUNDLES else sources.folder
        self._sides = {
            SIDES[0]: _Side.ours(str(base), config, dtype),
            SIDES[1]: _Side.plain(str(base), config, dtype),
        }
        rng = Random(config.seed)
        self._answers = [
            [
                rng.randrange(3, self._sides[SIDES[0]].vocab)
                for _ in range(rng.randint(config.shortest, config.longest))
            ]
            for _ in range(config.answers)
        ]
        self._labels = torch.tensor([rng.random() < 0.5 for _ in self._answers])
        self._contest = Contest("step", [SIDES[::-1]], self._round)

    def warm_up(self) -> None:
        self._round(-1)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        yield from play([self._contest], self.config.enough, done)

    def _round(self, number: int) -> Round:
        config, rng = self.config, Random(f"{self.seed} {number}")
        lengths = list(map(len, self._answers))
        order = rng.sample(range(len(lengths)), len(lengths))
        batches = {
            SIDES[0]: epoch_batches(lengths, config.batch, config.seed, number),
            SIDES[1]: [order[at : at + config.batch] for at in range(0, len(order), config.batch)],
        }
        working = {name: _Epoch(self._sides[name], self._answers, self._labels, batches[name]) for name in SIDES}
        take_turns(working, rng)
        return {name: one.seconds for name, one in working.items()}

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """Tokens/s of answers (padding is no token); ratio: ours over the plain loop's, of the same rounds."""
        return self._contest.rows(done, sum(map(len, self._answers)))

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """targets: what the training is to reach, and whether it did."""
        if not (rounds := self._contest.rounds(done)):
            return {}
        ratio = self._contest.ratio(rounds, *SIDES[::-1])
        return {"targets": [Goal("tokens/s over a plain PyTorch loop's", False, LEAST, "x", ratio).to_dict()]}

    def table(self, done: dict[str, Any]) -> Table:
        config, settings = self.config, self.settings
        table = Table(
            title=f"{settings['model']} {settings['dtype']}: a LoRA detector trained on {config.answers} answers, "
            f"{config.batch} a batch, tokens/s: median (p10-p90); ratio: median (95 % interval)",
            caption="\n".join(
                filter(None, [_told(self.more(done)), shortfall([self._contest], config.enough, done)])
            ),
        )
        for heading in ("n", *SIDES, "ratio"):
            table.add_column(heading, justify="right")
        for row in self.rows(done):
            rates = (str(Spread(**row["tokens_per_s"][side])) for side in SIDES)
            table.add_row(str(row["n"]), *rates, interval(row["ratio"]))
        return table


def _told(more: dict[str, Any]) -> str:
    """The target and whether it was met."""
    (goal,) = more.get("targets", [None])
    met = goal and ("met" if goal["met"] else "missed") + ("" if goal["certain"] else ", perhaps")
    return f"to reach is {goal['at_least']:g} x: {met}" if goal else ""


@dataclass
class _Epoch:
    """All batches of one side, a step each."""

    side: _Side
    answers: list[list[int]]
    labels: Tensor
    batches: list[list[int]]
    seconds: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.seconds) == len(self.batches)

    def step(self) -> None:
        batch = self.batches[len(self.seconds)]
        self.seconds.append(self.side.step([self.answers[number] for number in batch], self.labels[batch]))


class _Side:
    """One way to train: the loss of some answers, and the optimizer of its parameters."""

    def __init__(
        self, loss: Callable[[list[list[int]], Tensor], Tensor], parameters: list[nn.Parameter], vocab: int
    ) -> None:
        self.loss, self.parameters, self.vocab = loss, parameters, vocab
        self.optimizer = torch.optim.AdamW(parameters, lr=2e-5)

    def step(self, answers: list[list[int]], labels: Tensor) -> float:
        """Seconds of one step."""
        began = perf_counter()
        self.loss(answers, labels).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return perf_counter() - began

    @classmethod
    def ours(cls, base: str, config: TrainingConfig, dtype: torch.dtype) -> _Side:
        backbone = open_backbone(base, layers=config.layers, device=torch.device("cpu"), dtype=dtype)
        backbone.run_states_only(normed=True)
        head = LogitHead(backbone.hidden_size, torch.Generator().manual_seed(config.seed))
        model = HarmModel(adapt(backbone, Recipe(seed=config.seed)), head, "last")
        model.backbone.model.train()

        def loss(answers: list[list[int]], labels: Tensor) -> Tensor:
            logits, _ = model.logits([Reading(answer) for answer in answers])
            return harm_loss(logits, labels)

        return cls(loss, [*trainable(model.backbone.model).values(), *head.parameters()], model.backbone.vocab_size)

    @classmethod
    def plain(cls, base: str, config: TrainingConfig, dtype: torch.dtype) -> _Side:
        """What one writes with `transformers` and `peft`: a sequence classifier, batches as they come, a mask."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        from ..engine.models.bundles import smol_folder

        folder = smol_folder() if base in BUNDLES else base
        more = {} if config.layers is None else {"num_hidden_layers": config.layers}
        whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype, **more)
        pad = whole.config.pad_token_id = 0
        recipe = Recipe()
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=list(recipe.targets),
        )
        model = get_peft_model(whole, lora).train()

        def loss(answers: list[list[int]], labels: Tensor) -> Tensor:
            ids, there = padded(answers, pad, torch.device("cpu"))
            logits = model(input_ids=ids, attention_mask=there.long()).logits[:, 0]
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())

        return cls(loss, list(trainable(model).values()), whole.config.vocab_size)
