"""Where a number was measured: the machine, the versions, the commit, the command and how busy the machine was."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from .. import __version__
from ..doctor import cores, cpu_model

BUSY = 0.5  # load average a core above which measurements mean little


@dataclass(frozen=True)
class Machine:
    """load_average: runnable processes over the last minute when the measurement began; None where unknown."""

    processor: str
    cores: int
    threads: int
    memory_gib: float | None
    accelerator: str | None
    system: str
    python: str
    torch: str
    transformers: str
    stockade: str
    commit: str | None
    command: str
    load_average: float | None

    @property
    def warning(self) -> str | None:
        """What is wrong with measuring here now, if anything."""
        if self.load_average is None or self.load_average <= BUSY * self.cores:
            return None
        return (
            f"load average {self.load_average:.1f} on {self.cores} cores: others are using this machine, "
            f"and these numbers will be off; wait until it is below {BUSY * self.cores:.1f}"
        )


def this_machine() -> Machine:
    return Machine(
        processor=cpu_model(),
        cores=cores(),
        threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        stockade=__version__,
        commit=_commit(),
        command=shlex.join(["stockade", *sys.argv[1:]]),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _commit() -> str | None:
    """The checkout's commit, with `+` where files differ from it; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
