"""Who may ask, how often and how much at once: API keys, and limits for each. It speaks no HTTP."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from ..errors import BadInput, RateLimited, Unauthorized

ANONYMOUS = "anonymous"
MIN_KEY = 16  # characters


@dataclass(frozen=True)
class KeyLimits:
    """Of one key. per_minute: requests; as many may come at once after a pause. concurrent: requests under way."""

    per_minute: float | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("per_minute", 0.0), ("concurrent", 0)):
            value = getattr(self, name)
            if value is not None and not value > least:
                raise BadInput(f"{name} must be more than 0, not {value!r}")


@dataclass(eq=False)
class Tenant:
    """Whoever has one key. salt: keeps its cached pages apart from those of others; nobody is told."""

    name: str
    limits: KeyLimits
    clock: Callable[[], float] = monotonic
    salt: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    under_way: int = 0
    _tokens: float = 0.0
    _filled: float | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, from its beginning to the end of its reply. Raises `RateLimited`."""
        if self.limits.concurrent is not None and self.under_way >= self.limits.concurrent:
            raise RateLimited(f"this key has {self.under_way} requests under way, which is the limit", 1.0)
        self._take()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def _take(self) -> None:
        rate = self.limits.per_minute
        if rate is None:
            return
        now, burst = self.clock(), max(1.0, rate)
        if self._filled is None:
            self._tokens, self._filled = burst, now
        self._tokens = min(burst, self._tokens + (now - self._filled) * rate / 60)
        self._filled = now
        if self._tokens < 1:
            raise RateLimited(f"this key may send {rate:g} requests a minute", (1 - self._tokens) * 60 / rate)
        self._tokens -= 1


class Doors:
    """Lets in who has a key. keys: name -> key; without any, everybody is the tenant `anonymous`.

    Raises `BadInput` for keys that are too short to be secret, or that two names share.
    """

    def __init__(
        self,
        keys: Mapping[str, str] | None = None,
        limits: KeyLimits | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        limits = limits or KeyLimits()
        self._anonymous = None if keys else Tenant(ANONYMOUS, limits, clock)
        # Digests, because looking up an equal digest tells nothing about how close a wrong key came.
        self._tenants: dict[bytes, Tenant] = {}
        for name, key in (keys or {}).items():
            if len(key) < MIN_KEY:
                raise BadInput(f"the key of {name!r} has {len(key)} characters; it needs at least {MIN_KEY}")
            if _digest(key) in self._tenants:
                raise BadInput(f"the key of {name!r} is somebody else's, too")
            self._tenants[_digest(key)] = Tenant(name, limits, clock)

    @property
    def locked(self) -> bool:
        return self._anonymous is None

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose request this is, by its Authorization header. Raises `Unauthorized`."""
        if self._anonymous is not None:
            return self._anonymous
        scheme, _, key = (authorization or "").partition(" ")
        found = self._tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            raise Unauthorized("send a valid API key: Authorization: Bearer KEY")
        return found


def read_keys(file: Path) -> dict[str, str]:
    """Keys by name from a file with `NAME KEY` a line; # begins a comment. Raises `BadInput`."""
    keys: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] in keys:
            raise BadInput(f"{file}, line {number}: it must be a name, which no other line has, and a key")
        keys[words[0]] = words[1]
    if not keys:
        raise BadInput(f"{file} has no keys; a line is NAME KEY")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
