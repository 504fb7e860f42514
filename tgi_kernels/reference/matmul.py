"""Oracle of `tgi_kernels.matmul`."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, in_features]; weight: [out_features, in_features], not packed. Returns float64."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()
