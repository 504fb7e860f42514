"""The numbers that codes stand for: a scale and a zero point for each group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_SHRINKS: Final = tuple(
    1.0 - 0.025 * i for i in range(24)
)  # of the range of a group, to round the many better
_NORM: Final = 2.4  # power of the error of plain rounding: between squares and the largest


@dataclass(frozen=True)
class Grid:
    """What codes a matrix gets. group_size: columns that share a scale, -1 for all."""

    bits: int
    group_size: int
    is_symmetric: bool
    orders_columns: bool  # groups are of columns with inputs of like size, not of neighbours

    def size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def extent(self, low: Tensor, high: Tensor) -> Tensor:
        """The largest scale to try for groups whose numbers go from `low` to `high`, which are on each side of 0."""
        span = torch.maximum(high, -low) * 2 if self.is_symmetric else high - low
        return span / ((1 << self.bits) - 1)

    def zeros(self, low: Tensor, scale: Tensor) -> list[Tensor]:
        """Zero points to try with a scale: the middle, or those about the one that `low` asks for."""
        if self.is_symmetric:
            return [torch.full_like(low, float(1 << (self.bits - 1)))]
        # The first version of GPTQ's layout cannot hold a zero point of 0.
        exact = (-low / scale).round()
        return [(exact + by).clamp(1, (1 << self.bits) - 1) for by in (-1, 0, 1)]

    def round_to(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as float32; shapes broadcast."""
        return ((weight / scale).round_().add_(zero)).clamp_(0, (1 << self.bits) - 1)


@dataclass(frozen=True)
class TableGrid:
    """Numbers of a table; they are codes of their own, and there are no zero points."""

    numbers: (
        Tensor  # [codes] float32, in their order; the largest is about 1, for scales that float16 can hold
    )
    group_size: int
    orders_columns: bool = False

    def size(self, _in_features: int) -> int:
        return self.group_size

    def extent(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.maximum(high, -low) / self.numbers[-1]

    def zeros(self, low: Tensor, _scale: Tensor) -> list[Tensor]:
        return [torch.zeros_like(low)]

    def round_to(self, weight: Tensor, scale: Tensor, _zero: Tensor) -> Tensor:
        borders = (self.numbers[1:] + self.numbers[:-1]) / 2
        return self.numbers[torch.bucketize(weight / scale, borders, out_int32=True)]


def fit(weight: Tensor, grid: Grid | TableGrid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the least error, [out, groups] float32 each; scales are float16 numbers.

    weight: [out, in] float32, groups lying together. importance: [in], what the square of an error costs.
    """
    parts = weight.unflatten(1, (-1, grid.size(weight.shape[1])))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    largest = grid.extent(low, high)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    costs = None if importance is None else importance.view(parts.shape[1:])
    for shrink in _SHRINKS:
        tried = (largest * shrink).clamp(min=6e-8).half().float()
        for zero in grid.zeros(low * shrink, tried):
            total = _error(parts, tried, zero, grid, costs)
            better = total < best
            best = torch.where(better, total, best)
            scales, zeros = torch.where(better, tried, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _error(
    parts: Tensor, scale: Tensor, zero: Tensor, grid: Grid | TableGrid, costs: Tensor | None
) -> Tensor:
    """Of each group, [out, groups]. parts: [out, groups, size]; costs: [groups, size]."""
    scale, zero = scale.unsqueeze(2), zero.unsqueeze(2)
    off = (grid.round_to(parts, scale, zero) - zero).mul_(scale).sub_(parts)
    return off.abs_().pow_(_NORM).sum(2) if costs is None else off.square_().mul_(costs).sum(2)
