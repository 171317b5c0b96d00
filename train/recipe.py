"""How something is trained: numbers only, with the released scripts' values as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from ..engine.errors import BadInput

Kind = Literal["lora", "alora", "full"]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = ("q_proj", "v_proj")  # PEFT's own for these families, as released


@dataclass(frozen=True)
class Recipe:
    """AdamW, a linear schedule down to zero after `warmup` (a share of the steps), gradients cut to norm 1.

    rate: of the adapter or, where all is trained, of the model; head_rate: of a detector's head. batch: examples a
    step. max_tokens: of an example; longer ones are cut (an answer) or left out (a rewrite). adapter: LoRA on all
    tokens, activated LoRA, or none ("full"). rank, alpha, dropout, targets: of the LoRA. first_layer: the first one
    with a LoRA, counted from 0; what lies below is the base's. seed: of weights, order, dropout and splits.

    Raises `BadInput` for values out of range.
    """

    rate: float = 2e-5
    head_rate: float = 2e-5
    epochs: int = 4
    batch: int = 4
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_tokens: int = 512
    adapter: Kind = "lora"
    rank: int = 32
    alpha: int = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = TARGETS
    first_layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "max_tokens", "rank", "alpha"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rate", "head_rate"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise BadInput(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise BadInput(f"weight_decay must be at least 0, not {self.weight_decay}")
        if self.first_layer < 0 or (self.first_layer and self.adapter == "full"):
            raise BadInput(
                f"first_layer must be at least 0, and 0 where all weights are trained, not {self.first_layer}"
            )
        if self.adapter not in get_args(Kind):
            raise BadInput(f"adapter must be one of {', '.join(get_args(Kind))}, not {self.adapter!r}")
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or not self.targets:
            raise BadInput(f"targets must be some of {', '.join(LINEARS)}, not {', '.join(unknown) or 'none'}")
