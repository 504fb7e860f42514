"""Gated activations. Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from tgi_kernels._check import check_alike, check_contiguous, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")

Gate = Literal["silu", "gelu", "gelu_tanh"]


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up.

    x: [tokens, 2·inner], gate first. out: [tokens, inner], allocated when not given. Returns out.
    """
    return _gated(ops.silu_and_mul, x, out)


def gelu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) · up with the exact gelu, x·Φ(x). Shapes as `silu_and_mul`."""
    return _gated(ops.gelu_and_mul, x, out)


def gelu_tanh_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) · up with gelu's tanh approximation. Shapes as `silu_and_mul`."""
    return _gated(ops.gelu_tanh_and_mul, x, out)


def _gated(op: Any, x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    try:
        op(x, out)
    except RuntimeError:
        _check(x, out)
        raise
    return out


def _check(x: Tensor, out: Tensor) -> None:
    check_shape("x", x, ("tokens", "2·inner"))
    if x.shape[1] % 2:
        raise ValueError(f"x has {x.shape[1]} columns; gate and up side by side make an even number")
    check_contiguous("x", x)
    check_shape("out", out, (x.shape[0], x.shape[1] // 2))
    check_alike("out", out, "x", x)
    check_contiguous("out", out)
