"""Matrices of 4-bit floats (e2m1) in groups of 32 columns whose scales are powers of two.

OCP Microscaling Formats 1.0. Two columns lie in a byte, the first in its low half.
"""

from __future__ import annotations

from typing import Final

import torch

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.eight_bit import read_scales
from tgi_server.quantization.scheme import Tensors, read_as

GROUP: Final = 32


def read_e2m1(tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
    """Matrix `name`: weight_packed uint8 [out, in / 2], weight_scale [out, in / 32], exponents plus 127 in a byte."""
    if in_features % GROUP:
        raise StartupError(
            f"{tensors.folder}: {name} has {in_features} columns; mxfp4 needs a multiple of {GROUP}"
        )
    packed = read_as(tensors, f"{name}.weight_packed", (out_features, in_features // 2), torch.uint8)
    codes = torch.stack([packed & 0xF, packed >> 4], 2).flatten(1)
    scales = read_scales(tensors, f"{name}.weight_scale", (1, GROUP), out_features, in_features)
    return QuantWeight(codes, scales, None, GROUP, 4, values="e2m1")
