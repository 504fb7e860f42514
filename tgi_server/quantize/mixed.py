"""Codes of different widths inside one matrix, with scales of four bits: what EXL2 holds.

Columns are rounded as in GPTQ (Frantar et al. 2022, arXiv:2210.17323): the error of each is made up for in those
still to come, so that of a column k only 1 / spread[k, k]² of its square counts, the variance of its inputs that
those of later columns do not tell. `spread` is the upper Cholesky factor of the inverse of the inputs' products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_server.quantization.exl2 import scales_of
from tgi_server.quantize.solve import DAMPING, spread_of

_STEPS: Final = tuple(
    1.0 - 0.04 * i for i in range(13)
)  # of a range, to round the many better than the largest
_TOPS: Final = (1.0, 0.92, 0.84)  # of the largest step of a group, to hold the others in four bits better
_NEAR: Final = (-1, 0, 1)  # beside the nearest scale that there is
_TURNS: Final = (
    6  # of codes, after the first choice; error of 3 to 5 bits: 26.3 ‰ with 2, 25.4 with 6, 25.2 with 8
)


@dataclass(frozen=True)
class Mixed:
    """weight[n, order[k]] ≈ (codes[n, k] − 2^(bits − 1)) · scales_of(fine, largest)[n, group of k]."""

    codes: Tensor  # [out, in] uint8
    fine: Tensor  # [out, groups] uint8, 1 to 16
    largest: Tensor  # [groups] float16
    bits: tuple[int, ...]  # of each group
    sizes: tuple[int, ...]  # columns of each group
    order: Tensor  # [in] int64

    def dense(self) -> Tensor:
        """[out, in] float32, exact, columns in the order of x."""
        dense: Tensor = self.in_order()[:, self.order.argsort()]
        return dense

    def in_order(self) -> Tensor:
        """The same, columns in the order of codes."""
        scales = scales_of(self.fine, self.largest).float()
        parts = [
            (codes.float() - (1 << (bits - 1))) * scales[:, group : group + 1]
            for group, (codes, bits) in enumerate(
                zip(self.codes.split(list(self.sizes), 1), self.bits, strict=True)
            )
        ]
        return torch.cat(parts, 1)


def fit(part: Tensor, bits: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of a group with little error: fine [out] uint8 and largest [1] float16.

    part: [out, size] float32. counts: [size], how much the square of a column's error counts.
    """
    middle = 1 << (bits - 1)
    widest = part.abs().amax(1, keepdim=True).clamp(min=1e-12) / (middle - 0.5)
    tried = torch.stack([_error(part, widest * step, bits, counts) for step in _STEPS])
    steps = widest * torch.tensor(_STEPS)[tried.argmin(0)].unsqueeze(1)
    best, found = torch.inf, None
    for top in _TOPS:
        largest = (steps.max() * top).clamp(min=2e-5).half().view(1)
        nearest = (steps[:, 0] / largest.float()).sqrt().mul(16).round()
        fines = torch.stack([(nearest + beside).clamp(1, 16) for beside in _NEAR])
        errors = torch.stack(
            [_error(part, scales_of(fine[:, None], largest).float(), bits, counts) for fine in fines]
        )
        least, which = errors.min(0)
        if found is None or float(least.sum()) < best:
            best, found = float(least.sum()), (fines.gather(0, which[None])[0].to(torch.uint8), largest)
    assert found is not None
    return found


def rounded(part: Tensor, bits: int, counts: Tensor) -> Tensor:
    """What the nearest codes of a group mean. part: [out, size] float32; counts: as `fit` has them."""
    fine, largest = fit(part, bits, counts)
    scale = _positive(scales_of(fine[:, None], largest).float())
    return _levels(part, scale, bits) * scale


def damped(hessian: Tensor) -> Tensor:
    """A hessian that has an inverse, also where inputs are always zero; [in, in] float32."""
    diagonal = hessian.diagonal()
    return hessian + torch.diag(
        (DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny).expand_as(diagonal)
    )


def counts_of(spread: Tensor) -> Tensor:
    """How much the square of each column's error counts, [in]."""
    return spread.diagonal() ** -2


def solve(
    weight: Tensor, hessian: Tensor, bits: tuple[int, ...], sizes: tuple[int, ...], order: Tensor
) -> Mixed:
    """Codes whose products with inputs are nearly those of the weight.

    weight: [out, in] float32. hessian: [in, in], the sum of x · xᵀ over inputs x. order: [in], of the columns.
    """
    weight, hessian = weight[:, order], damped(hessian)[order][:, order]
    found = _cascade(weight, spread_of(hessian), bits, sizes, order)
    for _ in range(_TURNS):
        _descend(found, weight, hessian)
    return found


def _cascade(
    weight: Tensor, spread: Tensor, bits: tuple[int, ...], sizes: tuple[int, ...], order: Tensor
) -> Mixed:
    """Round one column after another; what that breaks is mended, as far as it can be, in those still to come."""
    left = weight.clone()
    counts = counts_of(spread)
    codes, fines, tops = torch.empty(weight.shape, dtype=torch.uint8), [], []
    stop = 0
    for width, size in zip(bits, sizes, strict=True):
        start, stop = stop, stop + size
        fine, largest = fit(left[:, start:stop], width, counts[start:stop])
        fines.append(fine)
        tops.append(largest)
        scale = _positive(scales_of(fine[:, None], largest).float())
        errors = torch.empty(len(left), size)
        for k in range(start, stop):
            code = _levels(left[:, k : k + 1], scale, width)
            codes[:, k] = (code[:, 0] + (1 << (width - 1))).to(torch.uint8)
            error = (left[:, k : k + 1] - code * scale) / spread[k, k]
            errors[:, k - start] = error[:, 0]
            left[:, k:stop].addr_(error[:, 0], spread[k, k:stop], alpha=-1)
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return Mixed(codes, torch.stack(fines, 1), torch.cat(tops), bits, sizes, order)


def _descend(found: Mixed, weight: Tensor, hessian: Tensor) -> None:
    """Give each column in turn the codes that are best beside all others; the error of products can only shrink."""
    slope = (weight - found.in_order()) @ hessian
    steepness = hessian.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    scales = _positive(scales_of(found.fine, found.largest).float())
    stop = 0
    for group, (bits, size) in enumerate(zip(found.bits, found.sizes, strict=True)):
        start, stop = stop, stop + size
        block, near = slope[:, start:stop].contiguous(), hessian[start:stop, start:stop]
        moves, scale, middle = torch.empty_like(block), scales[:, group], 1 << (bits - 1)
        for k in range(start, stop):
            old = found.codes[:, k].float() - middle
            new = _levels(old * scale + block[:, k - start] / steepness[k], scale, bits)
            found.codes[:, k] = (new + middle).to(torch.uint8)
            moves[:, k - start] = move = (new - old) * scale
            block.addr_(move, near[k - start], alpha=-1)
        slope -= moves @ hessian[start:stop]


def _positive(scale: Tensor) -> Tensor:
    """To divide by; what is rounded to nothing stays nothing."""
    return scale.clamp(min=1e-12)


def _error(part: Tensor, scale: Tensor, bits: int, counts: Tensor) -> Tensor:
    """[out]"""
    scale = _positive(scale)
    return (_levels(part, scale, bits) * scale - part).square_() @ counts


def _levels(part: Tensor, scale: Tensor, bits: int) -> Tensor:
    middle = 1 << (bits - 1)
    return (part / scale).round_().clamp_(-middle, middle - 1)
