"""Codes of a byte that need nothing but the weights: the nearest float8 (e4m3), or the nearest of 255 steps."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight

_E4M3_MAX: Final = 448.0
_INT8_MAX: Final = 127.0


def nearest_e4m3(weight: Tensor) -> QuantWeight:
    """float8 with a scale a row. weight: [out, in] float32, finite."""
    scales = _scales(weight, _E4M3_MAX)
    # The cast of some torch releases makes NaN of what exceeds the largest number.
    codes = (weight / scales).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantWeight(codes.view(torch.uint8), scales, None, weight.shape[1], 8, values="e4m3")


def nearest_int8(weight: Tensor, group_size: int) -> QuantWeight:
    """255 steps around 0 with a scale a row and group. weight: [out, in] float32, finite; in is whole groups."""
    groups = weight.unflatten(1, (-1, group_size))
    scales = _scales(groups, _INT8_MAX)
    steps = (groups / scales).round().clamp(-_INT8_MAX, _INT8_MAX).flatten(1)
    zeros = torch.full(scales.shape[:2], 128, dtype=torch.int16)
    return QuantWeight((steps + 128).to(torch.uint8), scales.squeeze(2).bfloat16(), zeros, group_size, 8)


def _scales(weight: Tensor, largest: float) -> Tensor:
    """What brings the largest number of each last axis to `largest`: bfloat16 numbers, which other readers round
    scales to, as float32; 1 where all are zero.
    """
    most = weight.abs().amax(-1, keepdim=True)
    scales = (most / largest).bfloat16().float()
    return torch.where(scales > 0, scales, 1.0)
