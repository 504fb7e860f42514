"""Products with weights of 4 and 8 bits on NVIDIA GPUs. csrc/quant/layout.cuh draws the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_dtype, check_shape
from tgi_kernels._library import ops
from tgi_kernels.columns import gather_columns
from tgi_kernels.quant_weight import QuantWeight

EDGE = 64  # rows of a strip, columns of a piece
_MAGIC = {torch.float16: 0x6400, torch.bfloat16: 0x4300}  # of zero points of 4 bits


@dataclass(frozen=True)
class PackedCuda:
    """A weight in the layout of the GPU kernels, for activations of `dtype`; made by `pack_cuda`."""

    words: Tensor  # int32 [strips, pieces, 128 · bits]
    pairs: Tensor  # int32 [strips, groups, 64]: scales and zero points
    dtype: torch.dtype
    has_half_scales: bool
    out_features: int
    in_features: int
    group_size: int
    bits: int
    order: Tensor | None
    most_fused: int | None = None  # tokens up to which codes are widened in registers; None: always


def fits_cuda(weight: QuantWeight) -> bool:
    """Whether it has 4 or 8 bits, and `pack_cuda` takes it."""
    in_features = weight.codes.shape[1]
    return (
        weight.bits in (4, 7, 8)
        and weight.zeros is not None
        and weight.scales.dtype != torch.float32
        and (weight.group_size % 16 == 0 or weight.group_size == in_features)
    )


def pack_cuda(weight: QuantWeight, dtype: torch.dtype) -> PackedCuda:
    """Lays a weight out for `quant_matmul`, on its device. dtype: of activations, float16 or bfloat16.

    Raises ValueError for what is not in integers with zeros, for groups that are no multiple of 16 columns, and for
    scales that float16 cannot hold.
    """
    check_dtype("scales", weight.scales, torch.float16, torch.bfloat16)
    if weight.zeros is None:
        raise ValueError(f"values of kind {weight.values} without zeros; GPUs take integers with zeros")
    out_features, in_features = weight.codes.shape
    bits = 4 if weight.bits <= 4 else 8
    scales = weight.scales
    if dtype == torch.float16 and scales.dtype == torch.bfloat16:
        scales = scales.half()
        if not torch.equal(scales.bfloat16(), weight.scales):
            raise ValueError("scales are bfloat16 numbers that float16 cannot hold; compute in bfloat16")
    columns = in_features + -in_features % EDGE
    size = columns if scales.shape[1] == 1 else weight.group_size
    if size % 16:
        raise ValueError(f"groups of {size} columns; GPUs take multiples of 16, or one group of all columns")
    return PackedCuda(
        _words(weight.codes, bits),
        _pairs(scales, weight.zeros, -(-columns // size), _MAGIC[dtype] if bits == 4 else 0),
        dtype,
        scales.dtype == torch.float16,
        out_features,
        in_features,
        size,
        bits,
        None if weight.order is None else weight.order.int(),
    )


def quant_matmul(
    x: Tensor,
    packed: PackedCuda,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias; then residual + y.

    x: [tokens, in_features]; bias: [out_features]; residual: like y, may be out. All of packed.dtype on one GPU.
    out: [tokens, out_features], allocated when not given. Returns out.
    On Hopper codes are multiplied as whole numbers and their sums scaled in float32, in an order that the weight's
    shape fixes, so bits do not depend on the number of tokens. Other GPUs, and rows of x that do not lie multiples
    of 16 bytes apart, take the dense product of the dequantised matrix.
    """
    check_shape("x", x, ("tokens", packed.in_features))
    check_dtype("x", x, packed.dtype)
    if packed.order is not None:
        x = gather_columns(x, packed.order)
    if out is None:
        out = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype, device=x.device)
    check_alike("out", out, "x", x)
    if not _is_fused(x):
        product = functional.linear(x, dequantise_packed(packed), bias)
        return out.copy_(product if residual is None else residual + product)
    ops.quant_matmul(
        x,
        packed.words,
        packed.pairs,
        packed.bits,
        packed.group_size,
        packed.has_half_scales,
        bias,
        residual,
        out,
    )
    return out


def dequantise_packed(packed: PackedCuda) -> Tensor:
    """The dense matrix [out_features, in_features] in packed.dtype, columns in the order of the codes."""
    shape = (packed.out_features, packed.in_features)
    out = torch.empty(shape, dtype=packed.dtype, device=packed.words.device)
    ops.quant_dequantise(
        packed.words, packed.pairs, packed.bits, packed.group_size, packed.has_half_scales, out
    )
    return out


def has_fused_product(device: torch.device) -> bool:
    """Whether weights are widened in registers there: on Hopper."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _is_fused(x: Tensor) -> bool:
    """Whether the fused product runs: where there is one, for rows that the bulk copy engine takes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and has_fused_product(x.device)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [out_features, in_features] to words [strips, pieces, 128 · bits] in the order of lanes' operands."""
    padded = functional.pad(codes, (0, -codes.shape[1] % EDGE, 0, -codes.shape[0] % EDGE))
    strips, pieces = padded.shape[0] // EDGE, padded.shape[1] // EDGE
    loads = 1 if bits == 4 else 2  # of 16 bytes that a lane needs for a piece
    # rows: strip, warp, h, g; columns: piece, load, step, c, t, e
    parts = padded.view(strips, 4, 2, 8, pieces, loads, 4 // loads, 2, 4, 2)
    strip, warp, h, g, piece, load, step, c, t, e = range(10)
    if bits == 4:
        parts = parts.permute(strip, piece, load, warp, g, t, step, c, h, e).flatten(7).contiguous()
        shifts = [4 * (i // 2) + 16 * (i % 2) for i in range(8)]
    else:
        parts = parts.permute(strip, piece, load, warp, g, t, step, c, h, e).flatten(8).contiguous()
        shifts = [8 * i for i in range(4)]
    words = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=codes.device)
    for i, shift in enumerate(shifts):
        words |= parts[..., i].int() << shift
    return words.view(strips, pieces, 128 * bits)


def _pairs(scales: Tensor, zeros: Tensor, groups: int, magic: int) -> Tensor:
    """Scales and zero points [out_features, groups] to pairs [strips, groups, 64]; groups past the last repeat it."""
    low = scales.contiguous().view(torch.int16).int() & 0xFFFF
    both = low | ((zeros.int() + magic) << 16)
    both = torch.cat([both, both[:, -1:].expand(-1, groups - both.shape[1])], 1)
    padded = functional.pad(both, (0, 0, 0, -len(both) % EDGE))
    return padded.view(-1, EDGE, groups).transpose(1, 2).contiguous()
