"""Linear layers with weights of a few bits, widened to the activations' type inside the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("quant_linear")

PANEL = 32  # output features that CPU kernels work on together
STORED_BITS = (4, 8)


@dataclass(frozen=True)
class QuantWeight:
    """A matrix of small integers: weight[n, k] = (codes[n, k] - zeros[n, g]) · scales[n, g], g = k // group_size.

    codes: [out_features, in_features] uint8, each below 2^bits. scales: [out_features, groups], float16 or
    bfloat16. zeros: [out_features, groups] int16, from 0 to 2^bits. groups · group_size = in_features.
    bits: 4 or 8; codes of fewer bits are stored as these.
    order: [in_features] int64, the column of x that belongs to each column of codes; None: its own.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    bits: int
    order: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = in_features // self.group_size
        if self.bits not in STORED_BITS or groups * self.group_size != in_features:
            raise ValueError(
                f"{in_features} columns of {self.bits} bits in groups of {self.group_size}: columns are stored in "
                "4 or 8 bits, and groups have to cover them"
            )
        if groups > 1 and self.group_size % 8:
            raise ValueError(
                f"groups of {self.group_size} columns; a size is a multiple of 8, or all columns"
            )
        check_dtype("codes", self.codes, torch.uint8)
        check_dtype("scales", self.scales, torch.float16, torch.bfloat16)
        check_dtype("zeros", self.zeros, torch.int16)
        check_shape("scales", self.scales, (out_features, groups))
        check_shape("zeros", self.zeros, (out_features, groups))
        if self.order is not None:
            check_shape("order", self.order, (in_features,))


@dataclass(frozen=True)
class PackedQuant:
    """A `QuantWeight` in the layout its device's kernels read; made by `pack_quant`."""

    words: Tensor  # int32 [panels, in_features / codes of a word, 32]
    scales: Tensor  # float32 [panels, groups, 32]
    offsets: Tensor  # the same: -zero · scale
    out_features: int
    in_features: int
    group_size: int
    bits: int
    order: Tensor | None


def stack(parts: Sequence[QuantWeight]) -> QuantWeight:
    """The rows of several weights as one. All share bits, group size, order and the type of scales."""
    first = parts[0]
    return QuantWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        first.group_size,
        first.bits,
        first.order,
    )


def dequantise(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """The dense matrix [out_features, in_features], each weight rounded once; columns in the order of x.

    In float32 nothing is rounded: codes less zeros have at most 9 bits and scales 11.
    """
    groups = weight.scales.shape[1]
    codes = weight.codes.unflatten(1, (groups, weight.group_size)).short()
    exact = (codes - weight.zeros.unsqueeze(2)).float() * weight.scales.float().unsqueeze(2)
    dense: Tensor = exact.flatten(1).to(dtype)
    return dense if weight.order is None else dense.index_select(1, weight.order.argsort())


def pack_quant(weight: QuantWeight) -> PackedQuant:
    """Lays a weight out for `quant_linear`, once, at load, on the weight's device."""
    out_features, in_features = weight.codes.shape
    scales = _panels(weight.scales.float())
    offsets = _panels(-weight.zeros.float() * weight.scales.float())
    return PackedQuant(
        _words(weight.codes, weight.bits),
        scales,
        offsets,
        out_features,
        in_features,
        weight.group_size,
        weight.bits,
        weight.order,
    )


def quant_linear(
    x: Tensor, packed: PackedQuant, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias.

    x: [tokens, in_features] float32, rows contiguous. bias: [out_features] float32.
    out: [tokens, out_features], allocated when not given. Returns out.
    The bits are those of `matmul.linear` with the matrix that `dequantise` gives in float32 (its columns and
    those of x in the order of the codes), for any number of tokens and threads.
    """
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    if out is None:
        out = torch.empty((x.shape[0], packed.out_features), dtype=torch.float32)
    else:
        check_shape("out", out, (x.shape[0], packed.out_features))
    try:
        ops.quant_linear(
            x, packed.words, packed.scales, packed.offsets, packed.bits, packed.group_size, bias, out
        )
    except RuntimeError:
        _check(x, packed, bias)
        check_alike("out", out, "x", x)
        check_contiguous("out", out)
        raise
    return out


def _check(x: Tensor, packed: PackedQuant, bias: Tensor | None) -> None:
    check_shape("x", x, ("tokens", packed.in_features))
    check_dtype("x", x, torch.float32)
    if bias is not None:
        check_shape("bias", bias, (packed.out_features,))
        check_alike("bias", bias, "x", x)


def _panels(values: Tensor) -> Tensor:
    """[out_features, columns] to [panels, columns, 32], zeros where the last panel has no feature."""
    padded: Tensor = functional.pad(values, (0, 0, 0, -len(values) % PANEL))
    panels: Tensor = padded.unflatten(0, (-1, PANEL))
    return panels.transpose(1, 2).contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [out_features, in_features] to words [panels, words, 32], a word's first code in its lowest bits."""
    count = 32 // bits
    padded = functional.pad(codes, (0, -codes.shape[1] % count)).unflatten(1, (-1, count))
    words = torch.zeros(padded.shape[:2], dtype=torch.int32, device=codes.device)
    for i in range(count):
        words |= padded[:, :, i].int() << (bits * i)
    return _panels(words)
