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

    def held(self, scales: Tensor) -> Tensor:
        """Scales as they are stored, in float16; float32."""
        return scales.half().float()

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
    costs = None if importance is None else importance.view(parts.shape[1:])
    fitted = _Fitted(parts, grid.bits, costs)
    for shrink in _SHRINKS:
        scales = ((high - low) * shrink / top).clamp(min=6e-8).half().float()
        if grid.is_symmetric:
            fitted.offer(scales, torch.full_like(scales, float(1 << (grid.bits - 1))))
        else:
            fitted.offer(scales, (-low * shrink / scales).round())
    if not grid.is_symmetric:
        for step in (-1, 2):
            fitted.offer(fitted.scales, fitted.zeros + step)
    return fitted.scales, fitted.zeros


class _Fitted:
    """The best scales and zero points so far, [out, groups] each. parts: [out, groups, size]; costs: [groups, size]."""

    def __init__(self, parts: Tensor, bits: int, costs: Tensor | None) -> None:
        self._parts, self._bits, self._costs = parts, bits, costs
        self._least = torch.full(parts.shape[:2], torch.inf)
        self.scales, self.zeros = torch.ones(parts.shape[:2]), torch.ones(parts.shape[:2])

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        """Take what is better."""
        # The first version of GPTQ's layout cannot hold a zero point of 0.
        zeros = zeros.clamp(1, (1 << self._bits) - 1)
        scale, zero = scales.unsqueeze(2), zeros.unsqueeze(2)
        off = (round_to(self._parts, scale, zero, self._bits) - zero).mul_(scale).sub_(self._parts)
        error = off.abs_().pow_(_NORM) if self._costs is None else off.square_().mul_(self._costs)
        total = error.sum(2)
        better = total < self._least
        self._least = torch.where(better, total, self._least)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, as float32; shapes broadcast."""
    return ((weight / scale).round_().add_(zero)).clamp_(0, (1 << bits) - 1)
