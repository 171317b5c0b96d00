"""Guards, weights and engines by the names that a command line or a configuration file gives them.

What takes seconds to import is imported where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from .errors import BadInput, InvalidGuard

if TYPE_CHECKING:
    from .engine import Engine
    from .guards import Guard
    from .models.sources import DetectorSource, Source
    from .outside import OutsideDetector
    from .passes import ReleaseMode

GUARD_MODELS = (
    *("llama-guard-3", "llama-guard-3-1b", "qwen3guard", "shieldgemma", "granite-guardian-3.1"),
    "llama-guard-4",
)
GUARDS = ("off", "protector", "probe", "ecso", *GUARD_MODELS)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class EngineNames:
    """What an engine is made of; see `stockade serve --help` for the names."""

    model: str = "smol"
    detector: str | None = None
    detoxifier: str | None = None
    device: str | None = None
    dtype: str | None = None
    weights: str | None = None
    kv_dtype: str | None = None

    def engine(self, outside: OutsideDetector | None = None) -> Engine:
        """Load it. outside: a detector in place of the named one. Raises `BadInput` and what `Engine` raises."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadInput(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        import torch

        from .engine import Engine

        return Engine(
            source_named(self.model),
            outside or (None if self.detector is None else detector_named(self.detector)),
            None if self.detoxifier is None else source_named(self.detoxifier),
            device=None if self.device is None else device_named(self.device),
            dtype=None if self.dtype is None else getattr(torch, DTYPES[self.dtype]),
            weights=self.weights,
            kv_dtype=self.kv_dtype,
        )


def guard_named(name: str, threshold: float | None = None, published: bool = False) -> Guard:
    """The guard of that name; that of a guard model refuses what its detector finds harmful.

    Raises `InvalidGuard` for another name, or a threshold for `off`.
    """
    from .guards import GenerativeGuard, Guard

    match name:
        case "off" if threshold is None and not published:
            return Guard.off()
        case "off":
            raise InvalidGuard("the guard off has no threshold and no published form")
        case "protector":
            return Guard.protector(threshold=threshold, published=published)
        case "probe" if not published:
            return Guard.probe(threshold=threshold)
        case "probe":
            raise InvalidGuard("the guard probe has no published form")
        case "ecso":
            return Guard.ecso(threshold=0.5 if threshold is None else threshold, published=published)
        case _ if name in GUARD_MODELS and not published:
            judge = GenerativeGuard(name, threshold=0.5 if threshold is None else threshold)
            return Guard(judge, max_rounds=0, name=name)
        case _ if name in GUARD_MODELS:
            raise InvalidGuard(f"the guard {name} has no published form")
    raise InvalidGuard(f"unknown guard {name!r}; there are {', '.join(GUARDS)}")


def release_named(name: str) -> ReleaseMode:
    """Raises `BadInput` for another name."""
    from .passes import ReleaseMode

    for mode in get_args(ReleaseMode):
        if mode == name:
            return mode
    raise BadInput(f"release must be one of {', '.join(get_args(ReleaseMode))}, not {name!r}")


def source_named(text: str) -> Source:
    """What loads under that name: ADAPTER,BASE as a pair; attach:ADAPTER on the model's own weights."""
    from .models.sources import Attached

    if text.startswith("attach:") and not Path(text).exists():
        return Attached(text.removeprefix("attach:"))
    adapter, comma, base = text.partition(",")
    return (adapter, base) if comma and not Path(text).exists() else text


def detector_named(text: str) -> DetectorSource:
    """As `source_named`; harm=LABEL+LABEL:SOURCE says which labels (ids or names) of a classifier mean harm. chat:
    before either: it reads conversations in its chat template."""
    if text.startswith("chat:") and not Path(text).exists():
        return _of_chats(detector_named(text.removeprefix("chat:")), text)
    if not text.startswith("harm=") or Path(text).exists():
        return source_named(text)
    from .models.sources import Attached, Classifier

    labels, colon, rest = text.removeprefix("harm=").partition(":")
    source = source_named(rest)
    if not labels or not colon or isinstance(source, Attached):
        raise BadInput(f"{text!r} is not harm=LABEL:SOURCE, with a classifier of its own as source")
    return Classifier(source, tuple(int(label) if label.isdecimal() else label for label in labels.split("+")))


def device_named(text: str) -> str:
    """Raises `BadInput` for a device that is not there."""
    import torch

    if text == "cpu" or (text.startswith("cuda") and torch.cuda.is_available()):
        return text
    there = "cpu or cuda" if torch.cuda.is_available() else "cpu; torch finds no CUDA device here"
    raise BadInput(f"cannot use the device {text!r}; there is {there}")


def _of_chats(found: DetectorSource, text: str) -> DetectorSource:
    from .models.sources import Attached, Classifier

    if isinstance(found, Attached):
        raise BadInput(f"{text!r}: an attached adapter has its template in its head; only classifiers are given one")
    return replace(found if isinstance(found, Classifier) else Classifier(found), template="chat")
