"""Codes for a matrix: the nearest ones, or those that GPTQ finds. Frantar et al. 2022, arXiv:2210.17323."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight

DAMPING: Final = 0.01  # of the mean diagonal, added to it: keeps the inverse finite where inputs hardly vary
_BLOCK: Final = 128  # columns whose errors are spread together
_SHRINKS: Final = tuple(
    1.0 - 0.03 * i for i in range(12)
)  # of the range of a group, to round the many better
_NORM: Final = 2.4  # power of the error that a range is chosen by: between squares and the largest


@dataclass(frozen=True)
class Grid:
    """What codes a matrix gets. group_size: columns that share a scale, -1 for all."""

    bits: int
    group_size: int
    is_symmetric: bool
    orders_columns: bool  # those with the largest inputs first, which makes their errors the smallest

    def size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Codes:
    """weight[n, k] ≈ (codes[n, k] - zeros[n, group_of[k]]) · scales[n, group_of[k]]."""

    codes: Tensor  # [out, in] uint8
    scales: Tensor  # [out, groups] float16
    zeros: Tensor  # [out, groups] int16
    group_of: Tensor  # [in] int64

    def dense(self) -> Tensor:
        """[out, in] float32, exact."""
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        return (self.codes.short() - zeros).float() * scales.float()

    def stored(self, bits: int) -> QuantWeight:
        """As kernels take it."""
        size = self.codes.shape[1] // self.scales.shape[1]
        order = self.group_of.argsort(stable=True)
        codes = self.codes.index_select(1, order)
        given = None if torch.equal(order, torch.arange(len(order))) else order
        return QuantWeight(codes, self.scales, self.zeros, size, bits, given)


def nearest(weight: Tensor, grid: Grid) -> Codes:
    """The code next to each weight. weight: [out, in] float32."""
    size = grid.size(weight.shape[1])
    parts = [_fit(part, grid) for part in weight.split(size, 1)]
    codes = [_round(part, *fit, grid.bits) for part, fit in zip(weight.split(size, 1), parts, strict=True)]
    group_of = torch.arange(weight.shape[1]) // size
    return _codes(torch.cat(codes, 1), [scale for scale, _ in parts], [zero for _, zero in parts], group_of)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Codes:
    """Codes whose products with the inputs that `hessian` was made of are nearly those of the weight.

    weight: [out, in] float32. hessian: [in, in], the sum of x · xᵀ over inputs x. Columns are rounded one after
    another; the error of each is made up for, as far as its inputs go with theirs, in those still to come.
    """
    columns = weight.shape[1]
    size = grid.size(columns)
    order = hessian.diagonal().argsort(descending=True) if grid.orders_columns else torch.arange(columns)
    left = weight[:, order].clone()
    spread = _spread(hessian[order][:, order], left)
    block = size * max(1, _BLOCK // size) if grid.group_size != -1 else _BLOCK
    codes, scales, zeros = torch.empty(weight.shape, dtype=torch.uint8), [], []
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(len(left), stop - start)
        for k in range(start, stop):
            if k % size == 0:
                scale, zero = _fit(left[:, k : k + size], grid)
                scales.append(scale)
                zeros.append(zero)
            column = left[:, k : k + 1]
            codes[:, k : k + 1] = code = _round(column, scale, zero, grid.bits)
            error = (column - (code.float() - zero) * scale) / spread[k, k]
            errors[:, k - start] = error[:, 0]
            left[:, k:stop] -= error * spread[k, k:stop]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    back = order.argsort()
    return _codes(codes[:, back], scales, zeros, (torch.arange(columns) // size)[back])


def _spread(hessian: Tensor, weight: Tensor) -> Tensor:
    """The upper Cholesky factor of the hessian's inverse; weights whose inputs are always zero become zero."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    idle = diagonal == 0
    diagonal[idle] = 1
    weight[:, idle] = 0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _fit(part: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [out, 1] each, of a group of columns [out, size]: those with the least error."""
    top = (1 << grid.bits) - 1
    low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
    if grid.is_symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        tried = ((high - low) * shrink / top).clamp(min=6e-8).half().float()
        middle = float(1 << (grid.bits - 1))
        # The first version of the format cannot hold a zero point of 0.
        point = (
            torch.full_like(low, middle)
            if grid.is_symmetric
            else (-low * shrink / tried).round().clamp(1, top)
        )
        error = ((_round(part, tried, point, grid.bits).float() - point) * tried - part).abs().pow(_NORM)
        total = error.sum(1, keepdim=True)
        better = total < best
        best = torch.where(better, total, best)
        scale, zero = torch.where(better, tried, scale), torch.where(better, point, zero)
    return scale, zero


def _round(part: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((part / scale).round() + zero).clamp(0, (1 << bits) - 1).to(torch.uint8)


def _codes(codes: Tensor, scales: list[Tensor], zeros: list[Tensor], group_of: Tensor) -> Codes:
    return Codes(codes, torch.cat(scales, 1).half(), torch.cat(zeros, 1).short(), group_of)
