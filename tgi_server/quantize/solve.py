"""Codes for a matrix: the nearest ones, or those whose products come nearest.

Frantar et al. 2022, arXiv:2210.17323, with scales chosen before the codes, so that columns may be rounded in order of
their inputs' size though groups are of neighbours. Then, in turns: each code is set anew to the best one beside all
others, and each scale to the best one of its codes. Every step can only lower the error of the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.quantize.grid import Grid, fit, round_to
from tgi_server.quantize.table_grid import TableGrid

DAMPING: Final = 0.01  # of the mean diagonal, added to it: keeps the inverse finite where inputs hardly vary
_BLOCK: Final = 128  # columns whose errors are spread together
_TURNS: Final = 4  # of codes and scales; the first gives half of the gain


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
    group_of = torch.arange(weight.shape[1]) // grid.size(weight.shape[1])
    scales, zeros = fit(weight, grid)
    codes = round_to(weight, scales[:, group_of], zeros[:, group_of], grid.bits)
    return Codes(codes.to(torch.uint8), scales.half(), zeros.short(), group_of)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Codes:
    """Codes whose products with the inputs that `hessian` was made of are nearly those of the weight.

    weight: [out, in] float32. hessian: [in, in], the sum of x · xᵀ over inputs x.
    """
    columns = weight.shape[1]
    by_size = hessian.diagonal().argsort(descending=True)
    place = by_size if grid.orders_columns else torch.arange(columns)  # groups follow each other in it
    weight, hessian = weight[:, place].clone(), hessian[place][:, place]
    order = torch.arange(columns) if grid.orders_columns else by_size
    solution = Solution(weight, hessian, order, grid)
    solution.improve()
    group_of = torch.empty(columns, dtype=torch.int64)
    group_of[place] = solution.group_of
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    codes[:, place] = solution.codes.to(torch.uint8)
    return Codes(codes, solution.scales.half(), solution.zeros.short(), group_of)


class Solution:
    """Codes on their way to the least error tr(E · H · Eᵀ), E being weight less what codes mean. Groups lie together.

    order: in which columns are rounded at first. Weights whose inputs are always zero become zero, in place.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, order: Tensor, grid: Grid | TableGrid) -> None:
        self._weight, self._grid = weight, grid
        self._hessian = _damped(hessian, weight)
        self.group_of = torch.arange(weight.shape[1]) // grid.size(weight.shape[1])
        spread = spread_of(self._hessian[order][:, order])
        importance = torch.empty(len(order))
        importance[order] = spread.diagonal() ** -2  # what an error costs that later columns make up for
        self.scales, self.zeros = grid.fit(weight, importance)
        self.codes = self._cascade(order, spread)

    def _cascade(self, order: Tensor, spread: Tensor) -> Tensor:
        """Round one column after another; what that breaks is mended, as far as it can be, in those still to come."""
        left, group_of = self._weight[:, order], self.group_of[order].tolist()
        codes = torch.empty_like(left)
        for start in range(0, len(order), _BLOCK):
            stop = min(start + _BLOCK, len(order))
            errors = torch.empty(len(left), stop - start)
            for k in range(start, stop):
                column, group = left[:, k], group_of[k]
                codes[:, k], error = self._rounded(column, group)
                errors[:, k - start] = error = error / spread[k, k]
                left[:, k:stop].addr_(error, spread[k, k:stop], alpha=-1)
            left[:, stop:] -= errors @ spread[start:stop, stop:]
        return codes[:, order.argsort()].contiguous()

    def improve(self) -> None:
        """Better codes and scales in turns."""
        for _ in range(_TURNS):
            self.descend()
            self.refit()

    def descend(self) -> None:
        """Give each column in turn the codes that are best beside the others."""
        slope = (self._weight - self._dense()) @ self._hessian  # half of the error's, for what codes mean
        steepness, group_of = self._hessian.diagonal(), self.group_of.tolist()
        for start in range(0, slope.shape[1], _BLOCK):
            stop = min(start + _BLOCK, slope.shape[1])
            block, near = slope[:, start:stop].contiguous(), self._hessian[start:stop, start:stop]
            moves = torch.empty_like(block)
            for k in range(start, stop):
                group = group_of[k]
                old = (self.codes[:, k] - self.zeros[:, group]) * self.scales[:, group]
                wanted = old + block[:, k - start] / steepness[k]
                self.codes[:, k], short = self._rounded(wanted, group)
                moves[:, k - start] = move = wanted - short - old
                block.addr_(move, near[k - start], alpha=-1)
            slope -= moves @ self._hessian[start:stop]

    def refit(self) -> None:
        """Give the groups of each row the scales that are best for its codes, all at once."""
        groups = self.scales.shape[1]
        steps = self.codes - self.zeros[:, self.group_of]
        aims = ((self._weight @ self._hessian) * steps).unflatten(1, (groups, -1)).sum(2)
        pairs = torch.empty(len(steps), groups, groups)
        for group, (part, rows) in enumerate(
            zip(steps.chunk(groups, 1), self._hessian.chunk(groups), strict=True)
        ):
            pairs[:, group] = ((part @ rows) * steps).unflatten(1, (groups, -1)).sum(2)
        pairs = pairs.double()
        diagonal = pairs.diagonal(dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-12
        found = self._grid.held(torch.linalg.solve(pairs, aims.double()).float())
        # A group whose codes hardly matter may get any scale; it keeps the one it has.
        self.scales = torch.where((found / self.scales - 1).abs() < 0.5, found, self.scales)

    def _rounded(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes of a column, and what it has more than they mean; [out] each."""
        scale, zero = self.scales[:, group], self.zeros[:, group]
        codes = self._grid.nearest(column, scale, zero)
        return codes, column - (codes - zero) * scale

    def _dense(self) -> Tensor:
        return (self.codes - self.zeros[:, self.group_of]) * self.scales[:, self.group_of]


def _damped(hessian: Tensor, weight: Tensor) -> Tensor:
    """The hessian as float32 that can be inverted; weights whose inputs are always zero become zero."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    idle = diagonal == 0
    diagonal[idle] = 1
    weight[:, idle] = 0
    diagonal += DAMPING * diagonal.mean()
    return damped.float()


def spread_of(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped hessian, [in, in] float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
