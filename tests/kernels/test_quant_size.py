"""The planned size of a packed weight is the size of the one that is then made, wherever kernels take it."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

import pytest
import torch
from torch import Tensor

from tgi_kernels.quant import fits_kernels, pack_quant
from tgi_kernels.quant_size import QuantKind, Values, packed_bytes
from tgi_kernels.quant_weight import BITS, QuantWeight

SHAPES = [(2, 7, 7), (33, 96, 24), (100, 128, 32), (64, 576, 64), (65, 257, 257), (320, 1152, 128)]
KINDS: list[tuple[Values, int]] = [(values, bits) for values, widths in BITS.items() for bits in widths]


def weights(values: Values, bits: int, device: str) -> list[tuple[QuantKind, QuantWeight]]:
    """Of every shape: with and without zeros, offsets, wide scales and an order, as far as they go together."""
    found = []
    is_integer = values == "integer"
    cases: list[tuple[Literal["none", "one", "many"], int, torch.dtype, bool]] = [
        ("one" if is_integer else "none", 0, torch.float16, False),
        ("many" if is_integer else "none", 0, torch.bfloat16, True),
        ("many" if is_integer else "none", 0, torch.float32, False),
        ("none", 2, torch.float16, False),
        ("none", 4, torch.float32, True),
    ]
    for rows, columns, size in SHAPES:
        shape = rows, columns // size
        for zeros, offset_bytes, scale, ordered in cases:
            middle = torch.full(shape, 1 << (bits - 1), dtype=torch.int16, device=device)
            if zeros == "many":
                middle.view(-1)[::3] = 3  # its products with scales of 24 bits are not exact
            codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
            offsets = torch.full(shape, 0.5 if offset_bytes == 2 else 0.1, device=device)
            weight = QuantWeight(
                codes,
                torch.full(shape, 0.1, dtype=scale, device=device),
                None if zeros == "none" else middle,
                size,
                bits,
                torch.arange(columns, device=device).flip(0) if ordered else None,
                values,
                offsets if offset_bytes else None,
            )
            kind = QuantKind(bits, size, values, zeros, scale.itemsize, offset_bytes, ordered)
            found.append((kind, weight))
    return found


@pytest.mark.parametrize(("values", "bits"), KINDS)
def test_a_packed_weight_has_the_size_that_was_planned(values: Values, bits: int, device: str) -> None:
    for kind, weight in weights(values, bits, device):
        planned = packed_bytes(kind, *weight.codes.shape, on_gpu=device == "cuda")
        assert (planned is not None) == fits_kernels(weight), (kind, weight.codes.shape)
        if planned is not None:
            packed = pack_quant(weight, torch.bfloat16 if device == "cuda" else torch.float32)
            parts = [getattr(packed, field.name) for field in fields(packed)]
            tensors = [part for part in parts if isinstance(part, Tensor) and part.device.type == device]
            made = sum(part.nbytes for part in tensors)
            assert planned == made, (kind, weight.codes.shape)
