"""Matrices of small integers with a scale and a zero point for each group of columns, before they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_kernels._check import check_dtype, check_shape

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

    def to(self, device: torch.device) -> QuantWeight:
        """The same on another device."""
        order = None if self.order is None else self.order.to(device)
        return QuantWeight(
            self.codes.to(device),
            self.scales.to(device),
            self.zeros.to(device),
            self.group_size,
            self.bits,
            order,
        )


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
