"""Codes that need nothing but the weights: the nearest number of a table in each block, or of 255 steps in each row."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight

_LEAST = 1e-38  # stands in for a scale of 0, that nothing is divided by


def nearest_codes(blocks: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """Of each number that its block's scale divides, the code of the nearest in a table.

    blocks: [blocks, size] float32. scales: [blocks] float32. numbers: [codes] float32, in any order. Returns uint8,
    like blocks; of two as near, the code of the smaller.
    """
    inverse = 1 / torch.where(scales.abs() < _LEAST, _LEAST, scales)
    ordered, codes = numbers.to(blocks.device).sort(stable=True)
    borders = (ordered[1:] + ordered[:-1]) / 2
    places = torch.bucketize(blocks * inverse.unsqueeze(1), borders, out_int32=True)
    return codes.to(torch.uint8)[places]


def round_rows(weight: Tensor) -> QuantWeight:
    """Eight bits a number and a scale of 16 bits a row. weight: [out, in] float32."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    halves = scales.half()
    # One step up where 127 steps would not reach the largest: patterns of positive floats are in their order.
    halves = (halves.view(torch.int16) + (halves.float() < scales)).view(torch.float16)
    steps = (weight / halves.float().clamp(min=_LEAST)).round()
    zeros = torch.full_like(halves, 128, dtype=torch.int16)
    return QuantWeight((steps + 128).to(torch.uint8), halves, zeros, weight.shape[1], 8)
