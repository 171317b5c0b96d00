"""Where a number was measured: the machine, the versions, the commit, the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..doctor import cores, cpu_model


@dataclass(frozen=True)
class Machine:
    """threads: that torch computes with."""

    processor: str
    cores: int
    threads: int
    memory_gib: float | None
    accelerator: str | None
    system: str


def this_machine() -> Machine:
    import torch  # seconds, which `stockade --help` does without

    return Machine(
        processor=cpu_model(),
        cores=cores(),
        threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
    )


def versions() -> dict[str, str]:
    return {
        "stockade": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def command_line() -> str:
    return shlex.join(["stockade", *sys.argv[1:]])


def commit() -> str | None:
    """The checkout's commit, with `+` where files differ from it; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = _git(root, "rev-parse", "--short=12", "HEAD")
        return found + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
