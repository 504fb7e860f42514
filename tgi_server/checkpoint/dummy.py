"""Made-up weights of real shapes, for measuring speed and memory without a checkpoint."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from tgi_server.errors import StartupError

_SPREAD = 0.02  # the usual standard deviation at the start of training: activations stay finite


class DummyCheckpoint:
    """Any tensor that is asked for, random but the same every time; made on the device, so nothing is copied."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = folder
        self._device = device
        self._dtype = dtype

    def names(self) -> frozenset[str]:
        """None: optional tensors, such as biases, are absent."""
        return frozenset()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of none: what has a shape of its own is optional, too."""
        raise StartupError(
            f"{self.folder}: {name} is made up in the shape that is asked for; it has none before"
        )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Ones for vectors (they are scales of norms), a normal distribution for matrices."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(0.0, _SPREAD, generator=generator)
