"""What this process may use: cores and memory, from affinity and control groups of either version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores this process may run on: its affinity, cut by the CPU quotas of its control groups."""
    cores = len(os.sched_getaffinity(0))
    for group in _groups("cpu"):
        quota = _read(group / "cpu.max").split() or [
            _read(group / "cpu.cfs_quota_us").strip(),
            _read(group / "cpu.cfs_period_us").strip(),
        ]
        if len(quota) == 2 and all(part.isdigit() and int(part) for part in quota):
            cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def usable_memory_bytes() -> int:
    """Memory that could be taken now without swapping, cut by the limits of its control groups.

    Pages of files count as used for a group, but are given up when needed: a checkpoint just fetched is such.
    """
    available = psutil.virtual_memory().available
    for group in _groups("memory"):
        for limit_file, used_file, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(group / limit_file).strip(), _read(group / used_file).strip()
            if limit.isdigit() and used.isdigit():
                stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
                available = min(available, int(limit) - int(used) + int(stat.get(reclaimable, 0)))
    return max(0, available)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the groups this process is in, its own and all above it, as far as they can be seen.

    In a container the group's own name is often not visible, but the root of what is mounted is that group.
    """
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        roots = (
            (_CGROUP / controllers, _CGROUP / controller) if controllers else (_CGROUP, _CGROUP / "unified")
        )
        for root in dict.fromkeys(roots):
            own = root / name.lstrip("/")
            yield from (
                group for group in (own, *own.parents) if group.is_relative_to(root) and group.is_dir()
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
