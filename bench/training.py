"""A detector's training step against a plain PyTorch loop of the same model, LoRA, optimizer and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ..engine.models.loader import BUNDLES
from ..train.backbone import adapt, open_backbone, trainable
from ..train.batches import epoch_batches, padded
from ..train.detector import HarmModel, LogitHead
from ..train.losses import harm_loss
from ..train.readings import Reading
from ..train.recipe import Recipe
from .report import Spread
from .workload import Sources

SIDES = ("stockade", "plain PyTorch")


@dataclass(frozen=True)
class TrainingConfig:
    """answers: random ones of `shortest` to `longest` tokens, all of them trained on by both sides in each round."""

    answers: int = 64
    batch: int = 8
    shortest: int = 16
    longest: int = 256
    layers: int | None = None
    rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class TrainingReport:
    """rates: of each side, tokens/s of answers (padding is no token). ratios: of the two in each round."""

    model: str
    dtype: str
    config: TrainingConfig
    rates: dict[str, Spread]
    ratios: Spread

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "training",
            "model": self.model,
            "dtype": self.dtype,
            "config": asdict(self.config),
            "tokens_per_second": {side: rate.to_dict() for side, rate in self.rates.items()},
            "ratio": self.ratios.to_dict(),
        }

    def table(self) -> Table:
        table = Table(
            title=f"{self.model} {self.dtype}: a LoRA detector trained on {self.config.answers} answers, "
            f"{self.config.batch} a batch, n = {self.config.rounds}, tokens/s: median (p10-p90)",
            caption=f"ratio {self.ratios.median:.2f} ({self.ratios.p10:.2f}-{self.ratios.p90:.2f})",
        )
        for heading in SIDES:
            table.add_column(heading, justify="right")
        table.add_row(*(str(self.rates[side]) for side in SIDES))
        return table


def run_training(
    sources: Sources,
    config: TrainingConfig,
    dtype: torch.dtype | None = None,
    told: Callable[[str, int, int], None] | None = None,
) -> TrainingReport:
    """Measure. Both sides take their steps in turn; each batches the answers in its own way, to the same size."""
    dtype = dtype or torch.float32
    rng = Random(config.seed)
    base = sources.model if str(sources.model) in BUNDLES else sources.folder
    sides = [_Side.ours(str(base), config, dtype), _Side.plain(str(base), config, dtype)]
    size = sides[0].vocab
    answers = [
        [rng.randrange(3, size) for _ in range(rng.randint(config.shortest, config.longest))]
        for _ in range(config.answers)
    ]
    labels = torch.tensor([rng.random() < 0.5 for _ in answers])
    count = sum(map(len, answers))
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for round_ in range(config.rounds + 1):  # the first is warm-up
        ours = epoch_batches([len(answer) for answer in answers], config.batch, config.seed, round_)
        order = rng.sample(range(len(answers)), len(answers))
        plain = [order[at : at + config.batch] for at in range(0, len(order), config.batch)]
        seconds = [0.0, 0.0]
        for place, both in enumerate(zip(ours, plain, strict=True)):
            for side in rng.sample((0, 1), 2):
                seconds[side] += sides[side].step([answers[n] for n in both[side]], labels[both[side]])
            if told is not None:
                told("training", round_ * len(ours) + place + 1, (config.rounds + 1) * len(ours))
        if round_:
            for side, name in enumerate(SIDES):
                rates[name].append(count / seconds[side])
    return TrainingReport(
        sources.name,
        str(dtype).removeprefix("torch."),
        config,
        {name: Spread.of(values) for name, values in rates.items()},
        Spread.of(one / other for one, other in zip(*rates.values(), strict=True)),
    )


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
