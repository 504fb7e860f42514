"""GGUF's blocks of quantised values as codes, scales and zero points or offsets.

Formulas and layouts: https://github.com/ggml-org/ggml, ggml-common.h. A block holds values that follow each other in
a row. The types with a K have 256 and pack the scales of groups of 16 or 32 in 4 to 8 bits beside one or two of the
whole block; products of the two are exact in float32, so that each weight is rounded once, as ggml rounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError


class _Groups(NamedTuple):
    """Blocks taken apart: codes [..., values] uint8; scales [..., groups]; a zero for all, or offsets [..., groups]."""

    bits: int
    codes: Tensor
    scales: Tensor
    zero: int | None = None
    offsets: Tensor | None = None


def weight_of_blocks(kind: str, blocks: Tensor, where: str) -> QuantWeight:
    """A matrix as codes. blocks: [rows, blocks, bytes] uint8, in the layout of `kind`, such as "Q4_K".

    Scales are float16 where the format has just one for each group, else float32. Raises StartupError, with `where`
    as its name, if some are no finite numbers.
    """
    rows = blocks.shape[0]
    bits, codes, scales, zero, offsets = DECODERS[kind](blocks)
    for what, found in (("scales", scales), ("offsets", offsets)):
        if found is not None and (bad := int((~found.isfinite()).sum())):
            raise StartupError(
                f"{where}: {bad} of {found.numel()} {what} of its {kind} blocks are NaN or infinite; the file is "
                "damaged or was made wrong, fetch it again"
            )
    group_size = codes.shape[-1] // scales.shape[-1]
    scales = scales.reshape(rows, -1)
    return QuantWeight(
        codes.reshape(rows, -1),
        scales,
        None if zero is None else torch.full(scales.shape, zero, dtype=torch.int16, device=scales.device),
        group_size,
        bits,
        offsets=None if offsets is None else offsets.reshape(rows, -1),
    )


def _q4_0(blocks: Tensor) -> _Groups:
    scale, codes = blocks.split([2, 16], -1)
    return _Groups(4, _planes(codes, 4), _halves(scale), zero=8)


def _q4_1(blocks: Tensor) -> _Groups:
    scale, least, codes = blocks.split([2, 2, 16], -1)
    return _Groups(4, _planes(codes, 4), _halves(scale), offsets=_halves(least).float())


def _q5_0(blocks: Tensor) -> _Groups:
    scale, high, codes = blocks.split([2, 4, 16], -1)
    return _Groups(5, _planes(codes, 4) | _bits(high) << 4, _halves(scale), zero=16)


def _q5_1(blocks: Tensor) -> _Groups:
    scale, least, high, codes = blocks.split([2, 2, 4, 16], -1)
    return _Groups(5, _planes(codes, 4) | _bits(high) << 4, _halves(scale), offsets=_halves(least).float())


def _q8_0(blocks: Tensor) -> _Groups:
    scale, codes = blocks.split([2, 32], -1)
    return _Groups(8, codes ^ 128, _halves(scale), zero=128)  # signed to unsigned


def _q2_k(blocks: Tensor) -> _Groups:
    small, codes, scale, least = blocks.split([16, 64, 2, 2], -1)
    return _Groups(
        2,
        _planes(codes.unflatten(-1, (2, 32)), 2),
        _halves(scale).float() * (small & 15),
        offsets=-(_halves(least).float() * (small >> 4)),
    )


def _q3_k(blocks: Tensor) -> _Groups:
    high, codes, small, scale = blocks.split([32, 64, 12, 2], -1)
    low = _planes(codes.unflatten(-1, (2, 32)), 2)
    six = _planes(small[..., :8], 4) | _planes(small[..., 8:], 2) << 4
    return _Groups(3, low | _planes(high, 1) << 2, _halves(scale).float() * (six.float() - 32), zero=4)


def _q4_k(blocks: Tensor) -> _Groups:
    scale, least, small, codes = blocks.split([2, 2, 12, 128], -1)
    scales, offsets = _sixes(scale, least, small)
    return _Groups(4, _planes(codes.unflatten(-1, (4, 32)), 4), scales, offsets=offsets)


def _q5_k(blocks: Tensor) -> _Groups:
    scale, least, small, high, codes = blocks.split([2, 2, 12, 32, 128], -1)
    scales, offsets = _sixes(scale, least, small)
    low = _planes(codes.unflatten(-1, (4, 32)), 4)
    return _Groups(5, low | _planes(high, 1) << 4, scales, offsets=offsets)


def _q6_k(blocks: Tensor) -> _Groups:
    low, high, small, scale = blocks.split([128, 64, 16, 2], -1)
    codes = _planes(low.unflatten(-1, (2, 64)), 4) | _planes(high.unflatten(-1, (2, 32)), 2) << 4
    return _Groups(6, codes, _halves(scale).float() * small.view(torch.int8), zero=32)


def _sixes(scale: Tensor, least: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of 8 groups, 6 bits each: four of each kind whole, the upper bits of the others above them."""
    first, second, rest = small.split(4, -1)
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], -1)
    leasts = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], -1)
    return _halves(scale).float() * scales, -(_halves(least).float() * leasts)


def _halves(data: Tensor) -> Tensor:
    """[..., 2] bytes as [..., 1] float16."""
    return data.contiguous().view(torch.float16)


def _planes(data: Tensor, bits: int) -> Tensor:
    """[..., bytes] as [..., values] of `bits` bits: first the lowest bits of all bytes, then the next, and so on.

    With a further axis before, of parts of the block, they follow each other.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    values = data.unsqueeze(-2) >> shifts.unsqueeze(-1) & (1 << bits) - 1
    return values.flatten(-2 if data.ndim == 3 else -3)


def _bits(data: Tensor) -> Tensor:
    """[..., bytes] as [..., 8 · bytes], each byte's lowest bit first."""
    return _planes(data.unsqueeze(-1), 1)


DECODERS: Final[dict[str, Callable[[Tensor], _Groups]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
