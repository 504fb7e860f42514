"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_contiguous, check_order, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, order: Tensor | None = None
) -> Tensor:
    """x · weight / √(mean of x² + eps), over the last dimension.

    x: [tokens, hidden], rows contiguous. weight: [hidden]. out: x's shape, may be x; allocated when not
    given. Returns out.
    order: [hidden] int32; column i of out is then column order[i] of the norm, of the same bits, and out is not x.
    On GPUs an index out of range gives NaN, on CPUs it is refused.
    Raises ValueError for shapes, dtypes or devices that do not fit each other.
    """
    if out is None:
        out = torch.empty_like(x)
    try:
        ops.rms_norm(x, weight, eps, out, order)
    except RuntimeError:
        _check(x, weight, out)
        _check_order(x, order, out)
        raise
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    *,
    order: Tensor | None = None,
) -> Tensor:
    """residual += x in place, rounded to its dtype; then the norm of what was stored, as `rms_norm`.

    x, residual: [tokens, hidden]. weight: [hidden]. out: x's shape, may be x; allocated when not given.
    Returns out. order: as of `rms_norm`.
    """
    if out is None:
        out = torch.empty_like(x)
    try:
        ops.add_rms_norm(x, residual, weight, eps, out, order)
    except RuntimeError:
        _check(x, weight, out)
        _check_order(x, order, out)
        _check_residual(x, residual)
        raise
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None
) -> Tensor:
    """(x - mean of x) · weight / √(variance of x + eps) + bias, over the last dimension.

    x: [tokens, hidden], rows contiguous. weight, bias: [hidden]. out: x's shape, may be x; allocated when not
    given. Returns out.
    Raises ValueError for shapes, dtypes or devices that do not fit each other.
    """
    if out is None:
        out = torch.empty_like(x)
    try:
        ops.layer_norm(x, weight, bias, eps, out)
    except RuntimeError:
        _check(x, weight, out)
        _check_bias(x, bias)
        raise
    return out


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None = None
) -> Tensor:
    """residual += x in place, rounded to its dtype; then the norm of what was stored, as `layer_norm`.

    x, residual: [tokens, hidden]. weight, bias: [hidden]. out: x's shape, may be x; allocated when not given.
    Returns out.
    """
    if out is None:
        out = torch.empty_like(x)
    try:
        ops.add_layer_norm(x, residual, weight, bias, eps, out)
    except RuntimeError:
        _check(x, weight, out)
        _check_bias(x, bias)
        _check_residual(x, residual)
        raise
    return out


def _check_residual(x: Tensor, residual: Tensor) -> None:
    check_shape("residual", residual, x.shape)
    check_alike("residual", residual, "x", x)
    check_contiguous("residual", residual)


def _check_bias(x: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        check_shape("bias", bias, x.shape[1:])
        check_alike("bias", bias, "x", x)


def _check_order(x: Tensor, order: Tensor | None, out: Tensor) -> None:
    if order is None:
        return
    check_shape("order", order, x.shape[1:])
    check_order(order, x.shape[1])
    if out.numel() and out.data_ptr() == x.data_ptr():
        raise ValueError("out is x; with an order it needs to be apart, so give another or none")


def _check(x: Tensor, weight: Tensor, out: Tensor) -> None:
    check_shape("x", x, ("tokens", "hidden"))
    check_shape("weight", weight, x.shape[1:])
    check_alike("weight", weight, "x", x)
    check_shape("out", out, x.shape)
    check_alike("out", out, "x", x)
    check_contiguous("out", out)
