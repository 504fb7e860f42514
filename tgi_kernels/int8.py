"""Products in which both sides are int8, on CPUs: activations are rounded just before, a scale a token.

csrc/int8/cpu.h sums whole numbers: bits depend neither on the instruction set nor on the number of tokens or threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes
from tgi_kernels.activation import Gate
from tgi_kernels.quant import GATES
from tgi_kernels.quant_size import MAX_INT8_COLUMNS
from tgi_kernels.quant_weight import QuantWeight

register_fakes("int8_linear")

PANEL = 32  # output features that kernels work on together
_QUAD = 4  # codes of a feature that lie together
_ORDER = (0, 2, 1, 3)  # of them, see csrc/int8/cpu_params.h
_ZERO = 128


@dataclass(frozen=True)
class PackedInt8:
    """A matrix as the kernels read it, and how its inputs are rounded; made by `pack_int8`.

    codes: [panels, ⌈in_features / 4⌉, 32, 4] uint8. scales: [panels, 32] float32. A weight is (code - 128) · scale.
    input_scale: of all inputs; 0: the largest number of a token becomes 127.5 steps.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    in_features: int
    input_scale: float


def fits_int8(weight: QuantWeight) -> bool:
    """Whether `pack_int8` takes it: int8 around 0 with a scale a row, on a CPU, that asks for rounded inputs."""
    return (
        weight.inputs == "rows"
        and weight.values == "integer"
        and weight.bits == 8
        and weight.codes.device.type == "cpu"
        and weight.scales.shape[1] == 1
        and weight.codes.shape[1] <= MAX_INT8_COLUMNS
        and weight.order is None
        and math.isinf(weight.input_bound)
        and weight.zeros is not None
        and bool((weight.zeros == _ZERO).all())
    )


def pack_int8(weight: QuantWeight) -> PackedInt8:
    """The matrix for `int8_linear`. Raises ValueError for what `fits_int8` says no to."""
    out_features, in_features = weight.codes.shape
    if not fits_int8(weight):
        raise ValueError(
            f"[{out_features}, {in_features}] codes of {weight.bits} bits, kind {weight.values}, in groups of "
            f"{weight.group_size} on {weight.codes.device}, inputs {weight.inputs}: the kernels take int8 around 0 on "
            f"CPUs with a scale a row, at most {MAX_INT8_COLUMNS} columns"
        )
    rows, columns = -out_features % PANEL, -in_features % _QUAD
    codes = functional.pad(weight.codes, (0, columns, 0, rows), value=_ZERO)
    panels = codes.view(-1, PANEL, codes.shape[1] // _QUAD, _QUAD)[..., _ORDER].transpose(1, 2)
    scales = functional.pad(weight.scales.float().squeeze(1), (0, rows)).view(-1, PANEL)
    fixed = 0.0 if weight.input_scale is None else float(weight.input_scale)
    return PackedInt8(panels.contiguous(), scales, out_features, in_features, fixed)


def int8_linear(
    x: Tensor,
    packed: PackedInt8,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias with x rounded to int8; then residual + y, or act(first half of y) · second half.

    x: [tokens, in_features] float32, rows contiguous. bias: [out_features]; residual: like y, may be out; both
    float32. out: [tokens, out_features], half as wide with a gate; allocated when not given. Returns out.
    As compressed-tensors defines it: x / scale to the nearest whole number, ties to even, from -128 to 127, where
    scale = largest of a token / 127.5 if none is stored. A token that holds a NaN becomes NaN.
    y = sum of products of codes · scale of x · scale of the row + bias, each step rounded to float32, for any number
    of tokens. Raises ValueError for what does not fit.
    """
    if gate is not None and residual is not None:
        raise ValueError(f"both a gate ({gate}) and a residual are given; a product takes one of the two")
    width = packed.out_features if gate is None else packed.out_features // 2
    if x.shape[-1] != packed.in_features:  # the op sees only whole quads
        _check(x, packed, bias, residual)
    if out is None:
        out = torch.empty((x.shape[0], width), dtype=torch.float32)
    elif out.shape[-1] != width:
        _check_out(out, x, width)
    try:
        ops.int8_linear(
            x, packed.codes, packed.scales, packed.input_scale, bias, residual, GATES.index(gate), out
        )
    except RuntimeError:
        _check(x, packed, bias, residual)
        _check_out(out, x, width)
        raise
    return out


def _check_out(out: Tensor, x: Tensor, width: int) -> None:
    check_shape("out", out, (x.shape[0], width))
    check_alike("out", out, "x", x)
    check_contiguous("out", out)


def _check(x: Tensor, packed: PackedInt8, bias: Tensor | None, residual: Tensor | None) -> None:
    check_shape("x", x, ("tokens", packed.in_features))
    check_dtype("x", x, torch.float32)
    if bias is not None:
        check_shape("bias", bias, (packed.out_features,))
        check_alike("bias", bias, "x", x)
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], packed.out_features))
        check_alike("residual", residual, "x", x)
