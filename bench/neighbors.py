"""What else this machine computes while something is measured: the cores that are busy with other people's work."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

BUSY = 0.1  # of all cores: where others take more, measurements mean little
_LOOK = 0.25  # seconds of a look, before and after a measurement
_PROC = Path("/proc")


class Clocks(NamedTuple):
    """Seconds since some moment: on the wall, that this process's cores did not idle, that its own work took."""

    wall: float
    busy: float
    own: float


def clocks(proc: Path = _PROC) -> Clocks | None:
    """What the clocks say now; None where the system does not tell (only Linux does).

    Time that a hypervisor gave to another machine counts as busy. Own work is this process's and that of all that it
    started.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    tick = 1.0 / os.sysconf("SC_CLK_TCK")
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in (proc / "stat").read_text(encoding="ascii").splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal
        spent = [[int(ticks) for ticks in line[1:9]] for line in lines if line and line[0] in mine]
        busy = sum(sum(ticks) - ticks[3] - ticks[4] for ticks in spent)
        return Clocks(time.perf_counter(), busy * tick, _own_ticks(proc, os.getpid()) * tick) if spent else None
    except (OSError, ValueError, IndexError):
        return None


def others(began: Clocks | None, ended: Clocks | None) -> float | None:
    """Cores that others kept busy between two looks at the clocks; None where they say nothing."""
    if began is None or ended is None or ended.wall <= began.wall:
        return None
    return max(0.0, (ended.busy - began.busy) - (ended.own - began.own)) / (ended.wall - began.wall)


def look(seconds: float = _LOOK) -> float | None:
    """Cores that others keep busy now."""
    began = clocks()
    time.sleep(seconds)
    return others(began, clocks())


def _own_ticks(proc: Path, process: int) -> int:
    """Of a process, those that it has waited for, and the same of all that it started."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # a process's name stands in brackets and may hold anything
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = sum(int(field) for field in fields[11:15])
    own, found = set(), {process}
    while found:
        own |= found
        found = {child for child, parent in parents.items() if parent in found} - own
    return sum(ticks.get(number, 0) for number in own)
