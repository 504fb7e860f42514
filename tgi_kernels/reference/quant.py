"""Oracle of `tgi_kernels.quant`."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantise(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, order: Tensor | None = None
) -> Tensor:
    """codes: [out_features, in_features]; scales, zeros: [out_features, groups]. Returns float64, exact.

    Column i of codes belongs to column order[i] of the result.
    """
    dense = torch.empty(codes.shape, dtype=torch.float64)
    for column in range(codes.shape[1]):
        group = column // group_size
        place = column if order is None else int(order[column])
        dense[:, place] = (codes[:, column].double() - zeros[:, group].double()) * scales[:, group].double()
    return dense


def quant_linear(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, in_features]; dense: what `dequantise` returned. Returns float64."""
    product = x.double() @ dense.T
    return product if bias is None else product + bias.double()
