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

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points to begin with, see `fit`."""
        return fit(weight, self, importance)

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as float32; shapes broadcast."""
        return round_to(weight, scale, zero, self.bits)


def fit(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the least error, [out, groups] float32 each; scales are float16 numbers.

    weight: [out, in] float32, groups lying together. importance: [in], what the square of an error costs.
    """
    parts = weight.unflatten(1, (-1, grid.size(weight.shape[1])))
    top = (1 << grid.bits) - 1
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    if grid.is_symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    costs = None if importance is None else importance.view(parts.shape[1:])
    for shrink in _SHRINKS:
        tried = ((high - low) * shrink / top).clamp(min=6e-8).half().float()
        for zero in _zeros(low * shrink, tried, grid):
            total = _error(parts, tried, zero, grid.bits, costs)
            better = total < best
            best = torch.where(better, total, best)
            scales, zeros = torch.where(better, tried, scales), torch.where(better, zero, zeros)
    return scales, zeros


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, as float32; shapes broadcast."""
    return ((weight / scale).round_().add_(zero)).clamp_(0, (1 << bits) - 1)


def _zeros(low: Tensor, scale: Tensor, grid: Grid) -> list[Tensor]:
    """Zero points to try with a scale: the middle, or those about the one that `low` asks for."""
    if grid.is_symmetric:
        return [torch.full_like(low, float(1 << (grid.bits - 1)))]
    # The first version of GPTQ's layout cannot hold a zero point of 0.
    exact = (-low / scale).round()
    return [(exact + by).clamp(1, (1 << grid.bits) - 1) for by in (-1, 0, 1)]


def _error(parts: Tensor, scale: Tensor, zero: Tensor, bits: int, costs: Tensor | None) -> Tensor:
    """Of each group, [out, groups]. parts: [out, groups, size]; costs: [groups, size]."""
    scale, zero = scale.unsqueeze(2), zero.unsqueeze(2)
    off = (round_to(parts, scale, zero, bits) - zero).mul_(scale).sub_(parts)
    return off.abs_().pow_(_NORM).sum(2) if costs is None else off.square_().mul_(costs).sum(2)
