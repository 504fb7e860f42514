"""Tensors of a checkpoint that is not on disk, and what a config reads from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.detect import scheme_of


class Held:
    """Tensors by name, in memory."""

    folder = Path("model")

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise StartupError(f"there is no tensor {name}")
        return tuple(self.tensors[name].shape)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors or self.tensors[name].shape != shape:
            found = tuple(self.tensors[name].shape) if name in self.tensors else None
            raise StartupError(f"{name} has shape {found}; config.json asks for {shape}")
        return self.tensors[name]


def read(section: dict[str, Any], tensors: dict[str, Tensor], out: int, columns: int) -> QuantWeight:
    """Matrix "m" of `tensors` by leaf, with `section` as its quantization_config."""
    scheme = scheme_of({"quantization_config": section}, Path("model"))
    assert scheme is not None
    held = Held({f"m.{leaf}": tensor for leaf, tensor in tensors.items()})
    assert scheme.covers(held, "m")
    return scheme.read(held, "m", out, columns)
