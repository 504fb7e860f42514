"""Linear layers with weights of a few bits, widened to the activations' type inside the product."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes
from tgi_kernels.activation import Gate
from tgi_kernels.columns import gather_columns
from tgi_kernels.matmul import GATED, linear, pack_linear
from tgi_kernels.quant_cpu import PackedCpu, fits_cpu, pack_cpu
from tgi_kernels.quant_cuda import PackedCuda, dequantise_packed, fits_cuda, pack_cuda, quant_matmul
from tgi_kernels.quant_runs import PackedRuns, dequantise_runs, fits_runs, pack_runs, runs_matmul
from tgi_kernels.quant_segments import Segments
from tgi_kernels.quant_size import FUSED_PIECES_TOKENS, FUSED_RUNS_TOKENS
from tgi_kernels.quant_weight import QuantWeight

register_fakes(
    "quant_linear", "quant_matmul", "quant_dequantise", "quant_matmul_runs", "quant_dequantise_runs"
)

PackedQuant = PackedCpu | PackedCuda | PackedRuns
GATES: tuple[Gate | None, ...] = (None, "silu", "gelu", "gelu_tanh")  # in the order of csrc/quant/ops.cpp


def fits_kernels(weight: QuantWeight | Segments) -> bool:
    """Whether `pack_quant` takes it on its device; another has to be multiplied as the dense matrix it stands for."""
    if isinstance(weight, Segments):
        return weight.parts[0].codes.is_cuda and fits_runs(weight)
    return fits_cuda(weight) or fits_runs(weight) if weight.codes.is_cuda else fits_cpu(weight)


def pack_quant(
    weight: QuantWeight | Segments, dtype: torch.dtype = torch.float32, *, deterministic: bool = False
) -> PackedQuant:
    """Lays a weight out for `quant_linear`, once, at load, on the weight's device.

    dtype: of activations; on CPUs float32. Raises ValueError for what the kernels cannot hold.
    On GPUs products of many tokens are quicker with the dense matrix, made for each; their bits are others. With
    `deterministic` none is made, and bits do not depend on the number of tokens. On CPUs they never do.
    """
    if isinstance(weight, QuantWeight) and not weight.codes.is_cuda:
        return pack_cpu(weight)
    if isinstance(weight, QuantWeight) and fits_cuda(weight):
        pieces = pack_cuda(weight, dtype)
        return pieces if deterministic else replace(pieces, most_fused=FUSED_PIECES_TOKENS)
    runs = pack_runs(weight, dtype)
    return runs if deterministic else replace(runs, most_fused=FUSED_RUNS_TOKENS)


def quant_linear(
    x: Tensor,
    packed: PackedQuant,
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
    Bits are the same for any number of tokens and threads, on GPUs if `pack_quant` was told. On CPUs they are those
    of `matmul.linear` with the matrix that `dequantise` gives in x's dtype, if its columns and those of x are in the
    order of the codes.
    """
    if gate is not None and residual is not None:
        raise ValueError(f"both a gate ({gate}) and a residual are given; a product takes one of the two")
    if not isinstance(packed, PackedCpu):
        return _linear_cuda(x, packed, bias, residual, gate, out)
    if packed.order is not None:
        x = gather_columns(x, packed.order)
    width = packed.out_features if gate is None else _half(packed.out_features)
    if out is None:
        out = torch.empty((x.shape[0], width), dtype=torch.float32)
    elif out.shape[-1] != width:
        _check_out(out, x, width)
    try:
        ops.quant_linear(
            x,
            packed.words,
            packed.scales,
            packed.shifts,
            packed.has_zeros,
            packed.zero,
            packed.table,
            packed.is_e4m3,
            packed.group_size,
            bias,
            residual,
            GATES.index(gate),
            out,
        )
    except RuntimeError:
        _check(x, packed, bias, residual)
        _check_out(out, x, width)
        raise
    return out


def _linear_cuda(
    x: Tensor,
    packed: PackedCuda | PackedRuns,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Gate | None,
    out: Tensor | None,
) -> Tensor:
    if packed.most_fused is not None and x.shape[0] > packed.most_fused:
        return _widened(x, packed, bias, residual, gate, out)
    to = out if gate is None else None
    if isinstance(packed, PackedCuda):
        product = quant_matmul(x, packed, bias, residual=residual, out=to)
    else:
        product = runs_matmul(x, packed, bias, residual=residual, out=to)
    return product if gate is None else GATED[gate](product, out)


def _widened(
    x: Tensor,
    packed: PackedCuda | PackedRuns,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Gate | None,
    out: Tensor | None,
) -> Tensor:
    """The product of the dense matrix, made for it."""
    dense = dequantise_packed(packed) if isinstance(packed, PackedCuda) else dequantise_runs(packed)
    if packed.order is not None:
        x = gather_columns(x, packed.order)
    return linear(x, pack_linear(dense), bias, residual=residual, gate=gate, out=out)


def _half(columns: int) -> int:
    if columns % 2:
        raise ValueError(f"the product has {columns} columns; gate and up side by side make an even number")
    return columns // 2


def _check_out(out: Tensor, x: Tensor, width: int) -> None:
    check_shape("out", out, (x.shape[0], width))
    check_alike("out", out, "x", x)
    check_contiguous("out", out)


def _check(x: Tensor, packed: PackedCpu, bias: Tensor | None, residual: Tensor | None) -> None:
    check_shape("x", x, ("tokens", packed.in_features))
    check_dtype("x", x, torch.float32)
    if bias is not None:
        check_shape("bias", bias, (packed.out_features,))
        check_alike("bias", bias, "x", x)
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], packed.out_features))
        check_alike("residual", residual, "x", x)
