"""Matrices of a few bits with a scale for each group of columns, before they are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Final, get_args

import torch
from torch import Tensor

from tgi_kernels._check import check_dtype, check_shape
from tgi_kernels.quant_size import Inputs, Values

BITS: Final[dict[Values, tuple[int, ...]]] = {
    "integer": (2, 3, 4, 5, 6, 7, 8),
    "nf4": (4,),
    "fp4": (4,),
    "e2m1": (4,),
    "e4m3": (8,),
}
# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
_NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' "fp4": a sign and three bits.
_FP4: Final = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
# OCP Microscaling Formats 1.0, section 5.3.3.
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class QuantWeight:
    """weight[n, k] = (value of codes[n, k] - zeros[n, g]) · scales[n, g] + offsets[n, g], g = k // group_size.

    codes: [out_features, in_features] uint8, each below 2^bits. scales: [out_features, groups] in float16, bfloat16
    or float32. groups · group_size = in_features.
    zeros: [out_features, groups] int16, from 0 to 2^bits; None: 0. offsets: [out_features, groups] float32; None: 0.
    A weight has one or the other.
    values: what codes stand for. order: [in_features] int64, the column of x that belongs to each column of codes;
    None: its own.
    inputs: how x is rounded. input_scale: [1] float32, the stored scale of all x; None: found for each. input_bound:
    what larger x count as when it is.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    bits: int
    order: Tensor | None = None
    values: Values = "integer"
    offsets: Tensor | None = None
    inputs: Inputs = "exact"
    input_scale: Tensor | None = None
    input_bound: float = inf

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = in_features // self.group_size
        if self.values not in get_args(Values) or self.bits not in BITS[self.values]:
            raise ValueError(f"codes of {self.bits} bits do not stand for values of kind {self.values}")
        if groups * self.group_size != in_features:
            raise ValueError(f"groups of {self.group_size} do not cover {in_features} columns")
        if groups > 1 and self.group_size % 8:
            raise ValueError(
                f"groups of {self.group_size} columns; a size is a multiple of 8, or all columns"
            )
        if self.zeros is not None and (self.offsets is not None or self.values != "integer"):
            raise ValueError(
                f"zeros beside offsets, or of values of kind {self.values}; only integers have zeros"
            )
        check_dtype("codes", self.codes, torch.uint8)
        check_dtype("scales", self.scales, torch.float16, torch.bfloat16, torch.float32)
        check_shape("scales", self.scales, (out_features, groups))
        if self.zeros is not None:
            check_dtype("zeros", self.zeros, torch.int16)
            check_shape("zeros", self.zeros, (out_features, groups))
        if self.offsets is not None:
            check_dtype("offsets", self.offsets, torch.float32)
            check_shape("offsets", self.offsets, (out_features, groups))
        if self.order is not None:
            check_shape("order", self.order, (in_features,))
        if self.input_scale is not None:
            check_dtype("input_scale", self.input_scale, torch.float32)
            check_shape("input_scale", self.input_scale, (1,))

    def to(self, device: torch.device) -> QuantWeight:
        """The same on another device."""
        return _with(self, {name: tensor.to(device) for name, tensor in _tensors(self).items()})


def table(values: Values) -> Tensor:
    """The number of each code, [2^bits] float32. Raises KeyError for integers, which need none."""
    if values == "e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    if values == "nf4":
        return torch.tensor(_NF4)
    half = torch.tensor({"fp4": _FP4, "e2m1": _E2M1}[values])
    return torch.cat([half, -half])


def fits_together(a: QuantWeight, b: QuantWeight) -> bool:
    """Whether both can be rows of one weight."""
    if (a.bits, a.group_size, a.values, a.scales.dtype) != (b.bits, b.group_size, b.values, b.scales.dtype):
        return False
    if _tensors(a).keys() != _tensors(b).keys() or (a.inputs, a.input_bound) != (b.inputs, b.input_bound):
        return False
    return a.order is None or b.order is None or torch.equal(a.order, b.order)


def stack(parts: Sequence[QuantWeight]) -> QuantWeight:
    """The rows of several weights that fit together as one. Of stored scales of one x the largest holds all of it."""
    rows = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in _tensors(parts[0])
        if name != "order"
    }
    if "input_scale" in rows:
        rows["input_scale"] = rows["input_scale"].amax(0, keepdim=True)
    return _with(parts[0], rows)


def some_rows(weight: QuantWeight, start: int, stop: int) -> QuantWeight:
    """Rows [start, stop), as far as there are any, as a weight of their own."""
    return _with(weight, {name: tensor[start:stop] for name, tensor in _row_tensors(weight).items()})


def ordered_rows(weight: QuantWeight, rows: Tensor) -> QuantWeight:
    """The weight with its rows in another order. rows: [out_features] int32 or int64, on any device."""
    places = rows.to(weight.codes.device)
    return _with(
        weight, {name: tensor.index_select(0, places) for name, tensor in _row_tensors(weight).items()}
    )


def dequantise(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """The dense matrix [out_features, in_features]: float32 rounded to dtype; columns in the order of x.

    In float32 a weight is rounded once; with scales of 16 bits and no offsets not at all, for codes less zeros have
    at most 9 bits and scales 11.
    """
    groups = weight.scales.shape[1]
    if weight.values == "integer":
        values = weight.codes.double()
    else:
        values = table(weight.values).to(weight.codes.device, torch.float64)[weight.codes.long()]
    values = values.unflatten(1, (groups, weight.group_size))
    if weight.zeros is not None:
        values = values - weight.zeros.unsqueeze(2)
    values = values * weight.scales.double().unsqueeze(2)
    if weight.offsets is not None:
        values = values + weight.offsets.double().unsqueeze(2)
    dense: Tensor = values.float().flatten(1).to(dtype)
    return dense if weight.order is None else dense.index_select(1, weight.order.argsort())


def _with(weight: QuantWeight, tensors: Mapping[str, Any]) -> QuantWeight:
    """The weight with other tensors."""
    return replace(weight, **tensors)


def _row_tensors(weight: QuantWeight) -> dict[str, Tensor]:
    """Those with a row for each of the weight's."""
    shared = ("order", "input_scale")
    return {name: tensor for name, tensor in _tensors(weight).items() if name not in shared}


def _tensors(weight: QuantWeight) -> dict[str, Tensor]:
    """Those there are, by field."""
    found = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
