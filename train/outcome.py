"""The folder that training writes: what an interrupted run goes on from while it lasts, the result in the end."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..engine.errors import BadInput, CacheWriteFailed
from .backbone import Backbone

CARD = "README.md"


@dataclass(frozen=True)
class Folder:
    """path: where the result appears. work: everything else, gone in the end."""

    path: Path

    @classmethod
    def begin(cls, path: Path) -> Folder:
        """Raises `BadInput` where something else is there already, `CacheWriteFailed` where nothing can be made."""
        folder = cls(Path(path))
        if folder.path.exists() and not folder.path.is_dir():
            raise BadInput(f"{path} is a file; the result is a folder")
        if folder.path.is_dir() and any(item != folder.work for item in folder.path.iterdir()):
            raise BadInput(f"{path} is not empty; give a new folder, or that of an interrupted run")
        try:
            folder.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheWriteFailed(f"{path} cannot be made: {error}") from error
        return folder

    @property
    def work(self) -> Path:
        return self.path / ".work"

    @property
    def state(self) -> Path:
        """Of the training loop."""
        return self.work / "state.pt"

    @property
    def new(self) -> Path:
        """Where the result is written before it is shown."""
        folder = self.work / "new"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, card: str) -> None:
        """Move what was written to its place, with the card, and forget the rest. Raises `CacheWriteFailed`."""
        try:
            (self.new / CARD).write_text(card, encoding="utf-8")
            for item in sorted(self.new.iterdir()):
                os.replace(item, self.path / item.name)
            shutil.rmtree(self.work)
        except OSError as error:
            raise CacheWriteFailed(f"{self.path} could not be written: {error}") from error


def versions(backbone: Backbone) -> str:
    """What a card says a run was made with."""
    return device_and_versions(next(backbone.model.parameters()).dtype, backbone.device)


def device_and_versions(dtype: torch.dtype, device: torch.device) -> str:
    named = str(dtype).removeprefix("torch.")
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {named} on {device.type} "
        f"({platform.machine()})"
    )
