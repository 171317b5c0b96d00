"""Tiny random models, an engine on them, and a server that most tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from stockade.engine.models.loader import ModelSet, load_models
from tests.engine.screened import engine_of
from tests.serving.live import Live, serving


@pytest.fixture(scope="session")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    """A model with eyes, a detector, a detoxifier."""
    return load_models(checkpoint("llava"), checkpoint("classifier"), checkpoint("llama-gqa"), dtype=torch.float32)


@pytest.fixture(scope="session")
def live(models: ModelSet) -> Iterator[Live]:
    with serving(engine_of(models, 200)) as found:
        yield found
