"""Linear layers whose result for a token does not depend on how many tokens there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes
from tgi_kernels.activation import Gate, gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from tgi_kernels.hopper_matmul import matmul, takes

register_fakes("pack_linear", "linear")

PANEL = 32

GATED = {"silu": silu_and_mul, "gelu": gelu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the layout its device's kernels read; made by `pack_linear`.

    data: on CPUs [panels, in_features, 32], on GPUs the weight itself, [out_features, in_features].
    """

    data: Tensor
    out_features: int
    in_features: int


def pack_linear(weight: Tensor) -> PackedLinear:
    """Lays a weight out for `linear`, once, at load. weight: [out_features, in_features], contiguous.

    On CPUs bfloat16 or float32, which are copied; widening to float32 happens in registers and is exact.
    Raises ValueError for another dtype or shape.
    """
    check_shape("weight", weight, ("out_features", "in_features"))
    check_contiguous("weight", weight)
    out_features, in_features = weight.shape
    if weight.device.type != "cpu":
        return PackedLinear(weight, out_features, in_features)
    check_dtype("weight", weight, torch.float32, torch.bfloat16)
    packed = torch.empty((-(-out_features // PANEL), in_features, PANEL), dtype=weight.dtype)
    ops.pack_linear(weight, packed)
    return PackedLinear(packed, out_features, in_features)


def linear(
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias; then residual + y, or act(first half of y) · second half.

    x: [tokens, in_features], rows contiguous; on CPUs float32. bias: [out_features]; residual: like y, may be
    out; both of x's dtype. out: [tokens, out_features], half as wide with a gate; allocated when not given.
    Returns out.
    Every step is rounded to x's dtype, as separate ops would. On CPUs and, in 16 bits, on Hopper GPUs every y
    is summed along in_features in one order, for any number of tokens. The rest is torch's: other GPUs,
    float32, and, since Hopper's copy engine takes rows in 16 bytes, matrices whose rows do not start on them.
    Raises ValueError for shapes, dtypes or devices that do not fit each other.
    """
    if gate is not None and residual is not None:
        raise ValueError(f"both a gate ({gate}) and a residual are given; a product takes one of the two")
    if not x.is_cpu and takes(x, packed.data):
        return matmul(x, packed.data, bias, residual=residual, gate=gate, out=out)
    if gate is not None:
        return GATED[gate](_linear(x, packed, bias, None, None), out)
    return _linear(x, packed, bias, residual, out)


def _linear(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    if not x.is_cpu:
        _check(x, packed, bias, residual)
        y = functional.linear(x, packed.data, bias)
        if residual is not None:
            return torch.add(residual, y, out=out)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty((x.shape[0], packed.out_features), dtype=torch.float32)
    try:
        ops.linear(x, packed.data, bias, residual, out)
    except RuntimeError:
        _check(x, packed, bias, residual)
        check_shape("out", out, (x.shape[0], packed.out_features))
        check_alike("out", out, "x", x)
        check_contiguous("out", out)
        raise
    return out


def _check(x: Tensor, packed: PackedLinear, bias: Tensor | None, residual: Tensor | None) -> None:
    check_shape("x", x, ("tokens", packed.in_features))
    if bias is not None:
        check_shape("bias", bias, (packed.out_features,))
        check_alike("bias", bias, "x", x)
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], packed.out_features))
        check_alike("residual", residual, "x", x)
    if x.is_cpu:
        check_dtype("x", x, torch.float32)
        if residual is not None:
            check_contiguous("residual", residual)
