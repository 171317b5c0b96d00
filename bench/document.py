"""The one JSON document that every measurement writes: what was measured, where, with what, and how quiet it was.

It holds figures; what they look like as tables, pictures or pages is said elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from ..doctor import cores
from ..engine.errors import BadInput
from .machine import command_line, commit, this_machine, versions
from .neighbors import BUSY, Clocks, clocks, look, others

FORMAT = 1


class BadDocument(BadInput):
    """A file is not the JSON document of a measurement, or is one of another kind or other settings."""


@dataclass(frozen=True)
class Load:
    """Cores that others kept busy: just before, all the while, just after; None where the system does not tell."""

    before: float | None
    during: float | None
    after: float | None

    @property
    def quiet(self) -> bool:
        """Whether nobody disturbed the measurement; false where that is not known."""
        return all(load is not None and load <= BUSY * cores() for load in (self.before, self.during, self.after))

    @property
    def warnings(self) -> list[str]:
        bound = BUSY * cores()
        if self.before is None or self.during is None or self.after is None:
            return ["this system does not tell how busy others keep it: these numbers may be off"]
        noisy = {"before": self.before, "during": self.during, "after": self.after}
        return [
            f"others kept {load:.2f} of {cores()} cores busy {when} the measurement (quiet is at most {bound:.2f}): "
            "these numbers are off; measure again when the machine is idle"
            for when, load in noisy.items()
            if load > bound
        ]


@dataclass
class Document:
    """One measurement.

    kind: latency, throughput, overhead, kernels … settings: whatever decides what was measured, the model and its
    dtype included. rows: the figures, one flat object each. units: raw results by the name of the piece of work, from
    which the rows are made and with which an interrupted run goes on. complete: whether all of the work was done.
    load_before, load_during, load_after: cores that others kept busy (see `Load`); quiet: none of them is above 0.1
    of all cores. took_s: seconds, those of parts that were resumed included. more: what only this kind has; in the
    JSON it stands beside all these.
    """

    kind: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    command: str
    started: str
    took_s: float
    load_before: float | None
    load_during: float | None
    load_after: float | None
    quiet: bool
    warnings: list[str] = field(default_factory=list)
    seed: int | None = None
    complete: bool = True
    units: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        known = asdict(self)
        more = known.pop("more")
        return {"format": FORMAT, **known, **more}

    def to_json(self) -> str:
        """One line. Raises ValueError for a figure that is no finite number."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def write(self, file: Path) -> None:
        """Write it whole or not at all, whatever happens meanwhile."""
        part = file.with_name(f"{file.name}.part")
        part.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(part, file)

    @classmethod
    def of_dict(cls, known: Mapping[str, Any]) -> Document:
        """Raises `BadDocument` for what no measurement of this format has written."""
        if not isinstance(known, Mapping) or known.get("format") != FORMAT:
            raise BadDocument(f"a document has the format {FORMAT}, not {_format(known)}")
        names = set(cls.__dataclass_fields__) - {"more"}
        if missing := sorted(names - set(known)):
            raise BadDocument(f"a document has {', '.join(sorted(names))}; this one lacks {', '.join(missing)}")
        kinds = {"settings": dict, "units": dict, "rows": list, "warnings": list, "machine": dict, "versions": dict}
        if wrong := [name for name, kind in kinds.items() if not isinstance(known[name], kind)]:
            raise BadDocument(f"a document's {', '.join(wrong)} must be {kinds[wrong[0]].__name__}")
        more = {name: value for name, value in known.items() if name not in names | {"format"}}
        return cls(**{name: known[name] for name in names}, more=more)


def check_file(file: Path | None) -> None:
    """Before hours of work: raises `BadInput` where no document could be written."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise BadInput(
            f"no document can be written to {file}: {file.parent} is no folder, or not writable, or {file} is"
        )


def read_document(file: Path, kind: str | None = None) -> Document:
    """The document in a file (its last line, where others stand before it). Raises `BadDocument` where there is
    none, or one of another kind, and OSError where the file cannot be read."""
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    try:
        document = Document.of_dict(json.loads(lines[-1] if lines else ""))
    except (ValueError, BadDocument) as error:
        raise BadDocument(f"{file} is not the JSON document of a measurement: {error}") from None
    if kind is not None and document.kind != kind:
        raise BadDocument(f"{file} was written by `bench {document.kind}`; wanted is one of `bench {kind}`")
    return document


@contextmanager
def as_written(document: Document) -> Iterator[None]:
    """Raises `BadDocument` where something in a document is missing, or is not what it must be."""
    try:
        yield
    except BadDocument:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadDocument(
            f"this is no document as `bench {document.kind}` of this version writes it; measure it again ({error!r})"
        ) from None


@dataclass
class Session:
    """A measurement under way: when it began and how busy others were then. earlier: the interrupted one that it goes
    on with."""

    started: str
    before: float | None
    clocks: Clocks | None
    began: float
    earlier: Document | None = None

    @classmethod
    def begin(cls, earlier: Document | None = None) -> Session:
        """Takes a look at the machine, for a quarter of a second."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = look()
        return cls(now, before, clocks(), perf_counter(), earlier)

    @property
    def warnings(self) -> list[str]:
        """What is wrong with measuring here now, if anything."""
        return Load(self.before, self.before or 0.0, self.before or 0.0).warnings[:1]

    def document(
        self,
        kind: str,
        settings: dict[str, Any],
        rows: list[dict[str, Any]],
        *,
        seed: int | None = None,
        complete: bool = True,
        units: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> Document:
        """The document of what was measured since `begin`; it takes another look at the machine."""
        seconds, during = perf_counter() - self.began, others(self.clocks, clocks())
        load = Load(self.before, during, look())
        started, warnings, quiet = self.started, load.warnings, load.quiet
        if self.earlier is not None:  # the worst of both: the figures are of both
            started, seconds = self.earlier.started, self.earlier.took_s + seconds
            warnings = [*self.earlier.warnings, *warnings]
            quiet = quiet and self.earlier.quiet
            load = Load(
                _worse(self.earlier.load_before, load.before),
                _worse(self.earlier.load_during, load.during),
                _worse(self.earlier.load_after, load.after),
            )
        return Document(
            kind=kind,
            settings=settings,
            rows=rows,
            machine=asdict(this_machine()),
            versions=versions(),
            commit=commit(),
            command=command_line(),
            started=started,
            took_s=round(seconds, 3),
            load_before=_rounded(load.before),
            load_during=_rounded(load.during),
            load_after=_rounded(load.after),
            quiet=quiet,
            warnings=list(dict.fromkeys(warnings)),
            seed=seed,
            complete=complete,
            units=units or {},
            more=more or {},
        )


def _worse(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _rounded(load: float | None) -> float | None:
    return None if load is None else round(load, 3)


def _format(known: object) -> str:
    return repr(known.get("format")) if isinstance(known, Mapping) else f"no object but {type(known).__name__}"
