"""Which guard a request runs under: what the operator offers, and what a client may ask for. It runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

from ..errors import InvalidGuard
from ..guards import GenerativeGuard, Guard, HarmHead, Probe, SelfJudge
from ..passes import ModelTraits, ReleaseMode
from .protocol import GuardChoice, OfferedGuard

_RELEASES: tuple[ReleaseMode, ...] = get_args(ReleaseMode)  # each looser than the one before


class Chosen(NamedTuple):
    policy: str
    guard: Guard
    release: ReleaseMode


@dataclass(frozen=True)
class Policy:
    """guards: what a client may choose from, by name; `default` is what it gets. release: when text leaves, unless
    the client asks for a tighter one. loosest: the loosest that it may ask for; None: `release`. loosen: whether it
    may set a threshold below the operator's.

    A client that asks for more is refused, not cut down: it would take the reply for something that it is not.
    Raises `InvalidGuard` for guards that a server does not offer.
    """

    guards: Mapping[str, Guard]
    default: str
    release: ReleaseMode = "verdict"
    loosest: ReleaseMode | None = None
    loosen: bool = False

    def __post_init__(self) -> None:
        if self.default not in self.guards:
            raise InvalidGuard(f"the default guard {self.default!r} is not among {', '.join(self.guards)}")
        for mode in (self.release, self.loosest):
            if mode is not None and mode not in _RELEASES:
                raise InvalidGuard(f"release must be one of {', '.join(_RELEASES)}, not {mode!r}")
        if self.loosest is not None and _RELEASES.index(self.loosest) < _RELEASES.index(self.release):
            raise InvalidGuard(f"the loosest release {self.loosest!r} is tighter than the default {self.release!r}")
        for name, guard in self.guards.items():
            if guard.published or not guard.recheck:
                raise InvalidGuard(
                    f"the guard {name!r} lets text out that no detector has read; a server has none such"
                )

    def bound(self, traits: Mapping[str, ModelTraits]) -> Policy:
        """The policy for an engine with these models. Raises `InvalidGuard` where one of its guards cannot run."""
        found = replace(self, guards={name: guard.bind(traits) for name, guard in self.guards.items()})
        if not found.can_release(self.default, self.release):
            raise InvalidGuard(f"the guard {self.default!r} cannot release {self.release!r}: it judges at the end")
        return found

    def choose(self, wanted: GuardChoice | None, traits: Mapping[str, ModelTraits]) -> Chosen:
        """The guard and the release of a request. Raises `InvalidGuard` for what a client may not have."""
        wanted = wanted or GuardChoice()
        name = self.default if wanted.policy is None else wanted.policy
        if name not in self.guards:
            raise InvalidGuard(f"this policy is not offered here; there are {', '.join(self.guards)}")
        guard, release = self.guards[name], wanted.release
        if release is None:
            release = self.release if self.can_release(name, self.release) else "verdict"
        elif release not in self._releases():
            raise InvalidGuard(f"release {release!r} is not offered here; there are {', '.join(self._releases())}")
        elif not self.can_release(name, release):
            raise InvalidGuard(f"the policy {name!r} cannot release {release!r}: it judges at the end")
        if wanted.threshold is not None:
            guard = self._tightened(name, guard, wanted.threshold, traits)
        return Chosen(name, guard, release)

    def offered(self, traits: Mapping[str, ModelTraits]) -> list[OfferedGuard]:
        """What a client may choose, the default first."""
        names = sorted(self.guards, key=lambda name: name != self.default)
        return [
            OfferedGuard(
                policy=name,
                threshold=_threshold(self.guards[name].detector, traits),
                releases=[mode for mode in self._releases() if self.can_release(name, mode)],
            )
            for name in names
        ]

    def can_release(self, name: str, release: ReleaseMode) -> bool:
        """Whether the guard can: a window needs a detector that reads along."""
        detector = self.guards[name].detector
        return release != "window" or detector is None or detector.incremental

    def _releases(self) -> tuple[ReleaseMode, ...]:
        return _RELEASES[: _RELEASES.index(self.loosest or self.release) + 1]

    def _tightened(self, name: str, guard: Guard, threshold: float, traits: Mapping[str, ModelTraits]) -> Guard:
        least = _threshold(guard.detector, traits)
        if least is None:
            raise InvalidGuard(f"the policy {name!r} has no threshold to set")
        if threshold < least and not self.loosen:
            raise InvalidGuard(f"threshold may be raised, not lowered; the policy {name!r} has {least:g}")
        return replace(guard, detector=_with_threshold(guard.detector, threshold))


def _threshold(detector: Any, traits: Mapping[str, ModelTraits]) -> float | None:
    if not isinstance(detector, HarmHead | Probe | SelfJudge | GenerativeGuard):
        return None
    if detector.threshold is not None:
        return detector.threshold
    return traits[detector.model].threshold


def _with_threshold(detector: Any, threshold: float) -> Any:
    if not isinstance(detector, HarmHead | Probe | SelfJudge | GenerativeGuard):
        return detector
    changed: Any = replace(detector, threshold=threshold)
    if isinstance(changed, Probe) and changed.fallback is not None:
        changed = replace(changed, fallback=_with_threshold(changed.fallback, threshold))
    return changed
