"""Finds an installed torch on the disk, without importing it."""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = (2, 10)  # the stable ABI that csrc/ is written against


def _search_path() -> list[Path]:
    """Where packages may lie: the interpreter's own folders first: that torch is the one to run with."""
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(entry) for entry in dict.fromkeys([*own, *sys.path, site.getusersitepackages()]) if entry]


def torch_version(torch_dir: Path) -> tuple[int, int]:
    """(major, minor) of the torch package in `torch_dir`; (0, 0) when its headers do not tell."""
    header = torch_dir / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        return (0, 0)
    text = header.read_text(encoding="utf-8")
    found = [re.search(rf"#define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(match.group(1)) if match else 0 for match in found)
    return (major, minor)


def find_torch() -> Path | None:
    """The folder of the first torch package that is new enough, or None."""
    for folder in _search_path():
        torch_dir = folder / "torch"
        if torch_version(torch_dir) >= OLDEST_TORCH:
            return torch_dir
    return None
