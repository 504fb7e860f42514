"""Oracle of `tgi_kernels.norm`."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., hidden]. Returns float64 of x's shape."""
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (out, the new residual): the sum rounded to residual's dtype, and its norm in float64."""
    total = (x.double() + residual.double()).to(residual.dtype)
    return rms_norm(total, weight, eps), total
