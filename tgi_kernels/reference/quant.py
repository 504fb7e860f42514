"""Oracle of `tgi_kernels.quant`."""

from __future__ import annotations

import torch
from torch import Tensor


def numbers(values: str, bits: int) -> Tensor:
    """What each code of a kind stands for: [2^bits] float64. nf4 to seven digits, all others exact."""
    if values == "integer":
        return torch.arange(1 << bits, dtype=torch.float64)
    if values == "nf4":
        return _normal_quantiles()
    if values == "fp4":
        half = torch.tensor(
            [0, 1 / 192, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12], dtype=torch.float64
        )
    else:
        exponents, digits, bias = {"e2m1": (2, 1, 1), "e4m3": (4, 3, 7)}[values]
        half = torch.tensor(
            [_float(code, digits, bias) for code in range(1 << (exponents + digits))]
        ).double()
        if values == "e4m3":
            half[-1] = float("nan")
    return torch.cat([half, -half])


def dequantise(
    codes: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    group_size: int,
    order: Tensor | None = None,
    *,
    values: Tensor | None = None,
    has_offsets: bool = False,
) -> Tensor:
    """(value of a code - zero) · scale, or value · scale + offset. Returns float64.

    codes: [out_features, in_features]; scales, shifts: [out_features, groups], shifts being zeros or offsets.
    values: of codes, [2^bits]; by default each stands for itself. Column i of codes belongs to column order[i] of
    the result.
    """
    dense = torch.empty(codes.shape, dtype=torch.float64)
    for column in range(codes.shape[1]):
        group = column // group_size
        place = column if order is None else int(order[column])
        code = codes[:, column]
        value = code.double() if values is None else values[code.long()].double()
        scale = scales[:, group].double()
        shift = torch.zeros_like(scale) if shifts is None else shifts[:, group].double()
        dense[:, place] = value * scale + shift if has_offsets else (value - shift) * scale
    return dense


def quant_linear(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [tokens, in_features]; dense: what `dequantise` returned. Returns float64."""
    product = x.double() @ dense.T
    return product if bias is None else product + bias.double()


def _float(code: int, digits: int, bias: int) -> float:
    """A number without sign, of an exponent above `digits` bits of significand; exponent 0 holds subnormals."""
    exponent, rest = divmod(code, 1 << digits)
    significand = rest / (1 << digits) + (1 if exponent else 0)
    return float(significand * 2.0 ** (max(exponent, 1) - bias))


def _normal_quantiles() -> Tensor:
    """Quantiles of the normal distribution, eight on one side and seven on the other, the largest made 1."""
    edge = 0.9677083  # of Dettmers et al. 2023, arXiv:2305.14314
    above, below = (
        torch.special.ndtri(torch.linspace(edge, 0.5, count, dtype=torch.float64)) for count in (9, 8)
    )
    both = torch.cat([-below[:-1], above]).sort().values
    return both / both.max()
