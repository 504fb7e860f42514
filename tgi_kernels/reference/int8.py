"""Oracle of `tgi_kernels.int8`."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_RANGE = 127.5
LEAST_SCALE = 2.0**-23  # of a token of zeros


def quantise_int8(x: Tensor, fixed: float = 0.0) -> tuple[Tensor, Tensor]:
    """The codes [tokens, columns] int64 and scales [tokens] float32 of x, in the same float32 steps.

    fixed: the scale of all x; 0: each token has its own.
    """
    x = x.float()
    scales = torch.full(x.shape[:1], fixed) if fixed else x.abs().amax(1) / HALF_RANGE
    scales = torch.where(scales == 0, LEAST_SCALE, scales)
    return (x / scales.unsqueeze(1)).clamp(-128, 127).round().long(), scales


def int8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, fixed: float = 0.0
) -> Tensor:
    """y [tokens, out_features] float32, of whole numbers; after the sums in the same float32 steps.

    weight: [out_features, in_features] whole numbers from -128 to 127; scales: [out_features].
    """
    codes, of_tokens = quantise_int8(x, fixed)
    sums = codes @ weight.long().T
    y = sums.float() * of_tokens.unsqueeze(1) * scales.float()
    return y if bias is None else y + bias
