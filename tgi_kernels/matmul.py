"""Linear layers whose result for a token does not depend on how many tokens there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes
from tgi_kernels.skinny_matmul import is_skinny, skinny_matmul

register_fakes("pack_linear", "linear")

PANEL = 32


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


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias.

    x: [tokens, in_features], rows contiguous; on CPUs float32. bias: [out_features] of x's dtype.
    out: [tokens, out_features], allocated when not given. Returns out.
    On CPUs every output is summed along in_features in one order, for any number of tokens and threads.
    """
    if not x.is_cpu:
        _check(x, packed, bias)
        if is_skinny(x, packed.data):
            return skinny_matmul(x, packed.data, bias, out=out)
        product = functional.linear(x, packed.data, bias)
        return product if out is None else out.copy_(product)
    if out is None:
        out = torch.empty((x.shape[0], packed.out_features), dtype=torch.float32)
    else:
        check_shape("out", out, (x.shape[0], packed.out_features))
    try:
        ops.linear(x, packed.data, bias, out)
    except RuntimeError:
        _check(x, packed, bias)
        check_alike("out", out, "x", x)
        check_contiguous("out", out)
        raise
    return out


def _check(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> None:
    check_shape("x", x, ("tokens", packed.in_features))
    if bias is not None:
        check_shape("bias", bias, (packed.out_features,))
        check_alike("bias", bias, "x", x)
    if x.is_cpu:
        check_dtype("x", x, torch.float32)
