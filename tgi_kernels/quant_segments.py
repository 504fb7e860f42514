"""Matrices of a few bits whose columns lie in runs of different widths, as EXL2 has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_kernels._check import check_shape
from tgi_kernels.quant_weight import QuantWeight, dequantise, fits_together, stack


@dataclass(frozen=True)
class Segments:
    """Runs of columns side by side: [out_features, in_features].

    parts: one run each, of [out_features, columns], without an order of its own. order: [in_features] int64, the
    column of x that belongs to each column of the parts, run after run; None: its own.
    """

    parts: tuple[QuantWeight, ...]
    order: Tensor | None = None

    def __post_init__(self) -> None:
        rows = {len(part.codes) for part in self.parts}
        if len(rows) != 1:
            raise ValueError(f"runs of columns have {sorted(rows)} rows; one number is needed")
        if any(part.order is not None for part in self.parts):
            raise ValueError("a run of columns has an order of its own; all runs have one together")
        if self.order is not None:
            check_shape("order", self.order, (sum(self.widths),))

    @property
    def widths(self) -> list[int]:
        """Columns of each run."""
        return [part.codes.shape[1] for part in self.parts]

    def to(self, device: torch.device) -> Segments:
        """The same on another device."""
        order = None if self.order is None else self.order.to(device)
        return Segments(tuple(part.to(device) for part in self.parts), order)


def segments_fit(a: Segments, b: Segments) -> bool:
    """Whether both can be rows of one matrix."""
    if (a.order is None) != (b.order is None) or a.widths != b.widths:
        return False
    if a.order is not None and b.order is not None and not torch.equal(a.order, b.order):
        return False
    return all(fits_together(left, right) for left, right in zip(a.parts, b.parts, strict=True))


def stack_segments(matrices: Sequence[Segments]) -> Segments:
    """The rows of several matrices that fit."""
    runs = zip(*(matrix.parts for matrix in matrices), strict=True)
    return Segments(tuple(stack(run) for run in runs), matrices[0].order)


def dequantise_segments(matrix: Segments, dtype: torch.dtype) -> Tensor:
    """The dense matrix, rounded once as `dequantise` does; columns in the order of x."""
    dense = torch.cat([dequantise(part, dtype) for part in matrix.parts], 1)
    return dense if matrix.order is None else dense.index_select(1, matrix.order.argsort())
