"""What this process may use: cores and memory, from affinity and control groups."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may run on: its affinity, cut by a CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _read(_CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def usable_memory_bytes() -> int:
    """Memory that could be taken now without swapping, cut by the control group's limit.

    Pages of files count as used for the group, but are given up when needed: a checkpoint just fetched is such.
    """
    available = psutil.virtual_memory().available
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        stat = dict(line.split(maxsplit=1) for line in _read(_CGROUP / "memory.stat").splitlines())
        reclaimable = int(stat.get("inactive_file", 0))
        available = min(available, int(limit) - int(used) + reclaimable)
    return available


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
