"""Where a layer's weights come from, and the device and type it computes in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tgi_kernels.quant_segments import Segments, dequantise_segments
from tgi_kernels.quant_weight import QuantWeight, dequantise, some_rows
from tgi_server.checkpoint.transfer import Transfer
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import Scheme

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_ROWS = 4096  # of an embedding, widened at once


class Source(Protocol):
    """Named tensors: a checkpoint, or made-up ones for measuring."""

    folder: Path

    def names(self) -> frozenset[str]:
        """What there is; a source that makes tensors up has no names but reads all."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, read from the header alone. Raises StartupError if it is missing."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored. Raises StartupError if it is missing or its shape is another."""


@dataclass(frozen=True)
class Weights:
    """A place in a checkpoint: `at("model").at("norm").parameter("weight", 64)` reads model.norm.weight.

    `dtype` is the type of activations; on CPUs `Linear` decides what type its matrix has. `transfer` takes large
    tensors to a GPU. `scheme` is the format of the matrices that are quantised; `deterministic` has GPUs multiply them
    so that bits do not depend on the number of tokens.
    """

    checkpoint: Source
    device: torch.device
    dtype: torch.dtype
    transfer: Transfer | None = None
    prefix: str = ""
    scheme: Scheme | None = None
    deterministic: bool = False

    def at(self, *path: str | int) -> Weights:
        return replace(self, prefix=self.name(".".join(map(str, path))))

    def name(self, leaf: str) -> str:
        return f"{self.prefix}.{leaf}" if self.prefix else leaf

    def has(self, leaf: str) -> bool:
        return self.name(leaf) in self.checkpoint.names()

    def parameter(self, leaf: str, *shape: int) -> Tensor:
        """A copy of a small tensor in `dtype`. Raises StartupError if its shape is not `shape`."""
        return self.stored(leaf, *shape).to(self.device, self.dtype, copy=True)

    def on_device(self, *parts: Tensor) -> Tensor:
        """The rows of stored tensors, one after the other, in `dtype` on the device.

        What is all of that already, as made-up weights are, is taken as it is.
        """
        if len(parts) == 1 and parts[0].device.type == self.device.type and parts[0].dtype == self.dtype:
            return parts[0]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        rows = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part, to in zip(parts, rows.split([len(part) for part in parts]), strict=True):
            if self.transfer is None or part.device.type == self.device.type:
                to.copy_(part)
            else:
                self.transfer.copy(part, to)
        return rows

    def matrix(self, leaf: str, out_features: int, in_features: int) -> Tensor | QuantWeight | Segments:
        """Matrix `leaf`, dense as `stored` gives it, or quantised; [out_features, in_features]."""
        name = self.name(leaf)
        if self.scheme is not None and self.is_quantised(leaf):
            return self.scheme.read(self.checkpoint, name, out_features, in_features)
        return self.stored(f"{leaf}.weight", out_features, in_features)

    def is_quantised(self, leaf: str) -> bool:
        """Whether matrix `leaf` is there in the checkpoint's format of few bits."""
        return self.scheme is not None and self.scheme.covers(self.checkpoint, self.name(leaf))

    def table(self, rows: int, columns: int) -> Tensor:
        """A copy of the matrix at this very place, to look rows up in: [rows, columns] on the device.

        GPUs have it in `dtype`, CPUs as it is stored. One that is quantised there is widened to bfloat16.
        """
        if self.scheme is None or not self.scheme.covers(self.checkpoint, self.prefix):
            stored = self.stored("weight", rows, columns)
            return stored.clone() if self.device.type == "cpu" else self.on_device(stored)
        weight = self.scheme.read(self.checkpoint, self.prefix, rows, columns)
        dtype = torch.bfloat16 if self.device.type == "cpu" else self.dtype
        if isinstance(weight, Segments):
            return dequantise_segments(weight, dtype).to(self.device)
        table = torch.empty(rows, columns, dtype=dtype, device=self.device)
        for start in range(0, rows, _ROWS):  # float64 on the way: of all at once it would be gigabytes
            part = some_rows(weight, start, start + _ROWS)
            table[start : start + _ROWS] = dequantise(part, dtype)
        return table

    def stored(self, leaf: str, *shape: int) -> Tensor:
        """The tensor as the checkpoint holds it, a view of its file.

        Raises StartupError if its shape is not `shape` or its type is no float of 16 or 32 bits.
        """
        name = self.name(leaf)
        tensor = self.checkpoint.read(name, shape)
        if tensor.dtype not in FLOATS:
            raise StartupError(
                f"{self.checkpoint.folder}: {name} is stored as {tensor.dtype}, with no scales beside it; "
                "bfloat16, float16 and float32 are served as they are"
            )
        return tensor
