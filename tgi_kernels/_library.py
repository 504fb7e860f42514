"""Loads the kernels' shared libraries; `ops` holds what they register."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def _load() -> Any:
    folder = Path(__file__).parent
    if not (folder / "_cpu.so").exists():
        raise ImportError(
            f"{folder / '_cpu.so'} is missing: the kernels are not built; run `pip install .` "
            "(or `pip install --no-build-isolation -e .`) in the source folder"
        )
    torch.ops.load_library(str(folder / "_cpu.so"))
    if (folder / "_cuda.so").exists():  # a build without CUDA has none
        torch.ops.load_library(str(folder / "_cuda.so"))
    return torch.ops.tgi


ops: Any = _load()


def register_fakes(*names: str) -> None:
    """Tells torch what these ops do to shapes: nothing, since they fill what they are given."""
    for name in names:
        torch.library.register_fake(f"tgi::{name}", lambda *_: None)
