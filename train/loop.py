"""The training loop: steps in an order that is known beforehand, and a file from which an interrupted run goes on.

A run that was interrupted and goes on does the same arithmetic as one that was not: on a CPU in fp32, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.errors import BadInput, CacheWriteFailed, StockadeError
from .batches import epoch_batches
from .recipe import Recipe

SAVE_SECONDS = 60.0  # between two states written to disk
LARGEST_NORM = 1.0  # of the gradients of a step

Progress = Callable[[str, int, int], None]
"""(what is under way, how much is done, how much there is)."""


class Diverged(StockadeError, ArithmeticError):
    """A loss or a gradient is not finite."""


class AnotherRun(BadInput):
    """The folder holds an interrupted run of other data, another model or another recipe."""


@dataclass(frozen=True)
class Trained:
    """losses: of each step. resumed_at: the step at which an interrupted run went on, 0 for one in one go."""

    losses: list[float]
    resumed_at: int


def fingerprint(*parts: object) -> str:
    """Of everything that decides a run's result: a run goes on only from a state with the same one."""
    return hashlib.sha256("\n".join(repr(part) for part in (torch.__version__, *parts)).encode()).hexdigest()


def train(
    groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
    lengths: Sequence[int],
    loss_of: Callable[[list[int]], Tensor],
    recipe: Recipe,
    state: Path,
    run: str,
    *,
    optimizer_type: type[torch.optim.AdamW] = torch.optim.AdamW,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Trained:
    """Minimize `loss_of` (indices of examples -> loss) over `recipe.epochs` epochs.

    groups: parameters by name, with their learning rate. lengths: of the examples. state: the file an interrupted
    run goes on from; it is left there in the end. run: the run's `fingerprint`. optimizer_type: AdamW or what is used
    like it.
    Raises `Diverged`, `AnotherRun`, `CacheWriteFailed`.
    """
    parameters = {name: parameter for some, _ in groups for name, parameter in some.items()}
    optimizer = optimizer_type(
        [{"params": list(some.values()), "lr": rate} for some, rate in groups],
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    batches = [
        batch for epoch in range(recipe.epochs) for batch in epoch_batches(lengths, recipe.batch, recipe.seed, epoch)
    ]
    losses = _load(state, run, parameters, optimizer)
    first, saved = len(losses), monotonic()
    for step in range(first, len(batches)):
        # dropout depends on the step alone, so a state needs no generator
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * share_of_rate(step, len(batches), recipe.warmup)
        loss = loss_of(batches[step])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), LARGEST_NORM)
        value = float(loss.detach())
        if not torch.isfinite(norm) or value != value:
            raise Diverged(f"step {step + 1}: the loss is {value}, its gradient {float(norm)}; a lower rate may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value)
        if progress is not None:
            progress("training", step + 1, len(batches))
        if monotonic() - saved >= save_seconds or step + 1 == len(batches):
            _save(state, run, parameters, optimizer, losses)
            saved = monotonic()
    return Trained(losses, first)


def share_of_rate(step: int, steps: int, warmup: float) -> float:
    """Up to 1 over the first `warmup` of the steps, then down in a line to 0 behind the last one."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / max(1.0, steps - rising)


def _save(
    state: Path,
    run: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    """The file appears whole or not at all."""
    part = state.with_name(f".{state.name}.part")
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        torch.save({"run": run, "parameters": values, "optimizer": optimizer.state_dict(), "losses": losses}, part)
        os.replace(part, state)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of the file's writer
        part.unlink(missing_ok=True)
        raise CacheWriteFailed(f"{state} could not be written: {error}") from error


def _load(
    state: Path, run: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Put what the file holds into its place; returns the losses until then, none where there is no file."""
    if not state.is_file():
        return []
    try:
        found: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)
        same = found["run"] == run
    except Exception as error:  # whatever a damaged file makes the reader do
        raise AnotherRun(f"{state} is no state of a run ({error}); remove it to begin anew") from None
    if not same:
        raise AnotherRun(
            f"{state} is of an interrupted run with other data, another model or other options; "
            "give those again to go on, or remove it to begin anew"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found["parameters"][name])
    optimizer.load_state_dict(found["optimizer"])
    return list(found["losses"])
