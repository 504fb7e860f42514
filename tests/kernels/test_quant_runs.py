"""Weights of every kind as GPUs hold them: whatever is packed is found again where kinds.cuh says that it lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.test_quant import Kind, exact, random_weight
from tgi_kernels.quant_runs import BLOCK, STRIP, PackedRuns, fits_runs, pack_runs
from tgi_kernels.quant_segments import Segments
from tgi_kernels.quant_size import QuantKind, packed_bytes
from tgi_kernels.quant_weight import QuantWeight, table

KINDS: list[Kind] = [
    *((bits, torch.float16, "integer", "zeros") for bits in range(2, 9)),
    (3, torch.bfloat16, "integer", "zeros"),
    *((bits, torch.float16, "integer", "one zero") for bits in (3, 8)),
    (5, torch.bfloat16, "integer", "one zero"),
    (6, torch.float32, "integer", "one zero"),
    (4, torch.float32, "integer", "zeros"),
    (5, torch.float32, "integer", "offsets"),
    (4, torch.float32, "nf4", "nothing"),
    (4, torch.float32, "fp4", "nothing"),
    (4, torch.bfloat16, "e2m1", "nothing"),
    (8, torch.float32, "e4m3", "nothing"),
]
# in_features, out_features, group size
SHAPES = [(64, 5, 64), (96, 70, 16), (320, 130, 32), (200, 64, 200), (768, 64, 128)]
_BITS = {16: 4, 17: 8}


def codes_of(words: Tensor, kind: int) -> Tensor:
    """words: int64 [lanes, 2 · bits], as a lane has them; [lanes, 32 slots, 2] codes, read as the header draws them."""
    bits = _BITS.get(kind, kind)
    slots = torch.zeros(len(words), 32, 2, dtype=torch.int64)
    fields = 16 // bits
    whole = 2 * bits * fields
    for slot in range(32):
        for e in range(2):
            half = (words >> (16 * e)) & 0xFFFF
            if kind == 16:
                slots[:, slot, e] = (words[:, slot // 4] >> (slot % 4 * 8 + 4 * e)) & 15
            elif slot < whole:
                slots[:, slot, e] = (half[:, slot // fields] >> (slot % fields * bits)) & ((1 << bits) - 1)
            elif bits == 6:
                first = (slot - whole) // 2 * 3
                low, high = (half[:, first + 2], 14) if slot % 2 else (half[:, first], 12)
                slots[:, slot, e] = (low >> 12) | ((half[:, first + 1] >> high) & 3) << 4
            else:
                for bit in range(bits):
                    slots[:, slot, e] |= (half[:, (slot - whole) * bits + bit] >> 15) << bit
    return slots


def blocks_of(packed: PackedRuns) -> list[Tensor]:
    """Of each run its codes [strips · 64, blocks · 128], zeros where there are none."""
    found, at = [], 0
    strips = -(-packed.out_features // STRIP)
    for kind, columns, _, _ in packed.runs.tolist():
        bits, blocks = _BITS.get(kind, kind), -(-columns // BLOCK)
        count = strips * blocks * 256 * bits
        words = packed.words[at : at + count].long().bitwise_and(0xFFFFFFFF).view(strips, blocks, -1)
        at += count
        out = torch.zeros(strips, STRIP, blocks, BLOCK, dtype=torch.int64)
        loads = 2 * bits // 4
        for quarter in range(4):
            for lane in range(32):
                own = [
                    words[:, :, (i * 128 + quarter * 32 + lane) * 4 + j]
                    for i in range(loads)
                    for j in range(4)
                ]
                tail = loads * 512 + (quarter * 32 + lane) * 2
                own += [words[:, :, tail + j] for j in range(2 * bits % 4)]
                slots = codes_of(torch.stack(own, 2).flatten(0, 1), kind).view(strips, blocks, 32, 2)
                for slot in range(32):
                    row = quarter * 16 + lane // 4 + slot % 2 * 8
                    column = slot // 4 * 16 + slot // 2 % 2 * 8 + lane % 4 * 2
                    out[:, row, :, column : column + 2] = slots[:, :, slot]
        found.append(out.view(strips * STRIP, blocks * BLOCK))
    assert at == len(packed.words)
    return found


def dense_of(packed: PackedRuns) -> Tensor:
    """The matrix in float64, of codes and scales where they lie."""
    strips, at, parts = -(-packed.out_features // STRIP), 0, []
    count = (1, 1, 2, 2, 2, 4, 4)[packed.scaling]
    for codes, (kind, columns, size, zero) in zip(blocks_of(packed), packed.runs.tolist(), strict=True):
        groups = -(-codes.shape[1] // size)
        own = packed.scales[at : at + strips * groups * 32 * count].view(strips, groups, 4, 8, count)
        at += own.numel()
        dtype = (torch.float16, torch.bfloat16)[packed.scaling % 2]
        shifts = torch.full((strips, groups, 4, 8, 2), float(zero)).double()
        if packed.scaling < 2:
            scales = torch.stack([own[..., 0].short(), (own[..., 0] >> 16).short()], -1).view(dtype).double()
        elif packed.scaling < 4:
            scales, shifts = own.short().view(dtype).double(), (own >> 16).double()
        else:
            scales = own[..., :2].contiguous().view(torch.float32).double()
            if count == 4:
                shifts = own[..., 2:].contiguous().view(torch.float32).double()
        # strips, groups, quarters, g, h to rows and groups
        scale, shift = (
            part.permute(0, 2, 4, 3, 1).reshape(strips * STRIP, groups) for part in (scales, shifts)
        )
        values = codes.double()
        if kind == 17:
            values = table("e4m3").double()[codes]
        elif packed.table is not None:
            values = packed.table.double()[codes]
        group = torch.arange(columns) // size
        values, scale, shift = values[:, :columns], scale[:, group], shift[:, group]
        parts.append(values * scale + shift if packed.scaling == 5 else (values - shift) * scale)
    assert at == len(packed.scales)
    return torch.cat(parts, 1)[: packed.out_features]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_packed_weight_is_the_one_it_was_made_of(noise: torch.Generator, kind: Kind) -> None:
    for shape in SHAPES:
        weight = random_weight(noise, shape, *kind)
        assert fits_runs(weight)
        assert torch.equal(dense_of(pack_runs(weight, torch.bfloat16)), exact(weight))


def test_runs_of_several_widths_lie_one_after_another(noise: torch.Generator) -> None:
    parts = [
        random_weight(noise, (96, 70, 32), 8, shift="one zero"),
        random_weight(noise, (160, 70, 32), 5, shift="one zero"),
        random_weight(noise, (320, 70, 64), 3, shift="one zero"),
    ]
    packed = pack_runs(Segments(tuple(parts)), torch.float16)
    assert torch.equal(dense_of(packed), torch.cat([exact(part) for part in parts], 1))
    kind = QuantKind(4, 32, is_mixed=True)
    assert packed_bytes(kind, 64, 1024, on_gpu=True) == 64 * 1024 // 2 + 64 * 32 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tables_numbers_lose_less_than_by_plain_rounding(
    noise: torch.Generator, dtype: torch.dtype
) -> None:
    for values in ("nf4", "fp4", "e2m1"):
        packed = pack_runs(random_weight(noise, (64, 5, 64), 4, torch.float32, values, "nothing"), dtype)
        assert packed.table is not None
        scaled = packed.table * packed.table_scale
        lost = (scaled.to(dtype).float() - scaled).norm() / packed.table_scale
        assert lost <= (packed.table.to(dtype).float() - packed.table).norm()


def test_what_gpus_cannot_hold_is_refused_with_the_reason(noise: torch.Generator) -> None:
    groups = random_weight(noise, (96, 8, 24), 5)
    nan = random_weight(noise, (32, 3, 32), 8, torch.float32, "e4m3", "nothing")
    nan.codes[1, 5] = 0xFF
    many = Segments(tuple(random_weight(noise, (32, 8, 32), 2 + i % 2) for i in range(9)))
    odd = Segments((random_weight(noise, (48, 8, 48), 4), random_weight(noise, (32, 8, 32), 4)))
    mixed = Segments(
        (random_weight(noise, (32, 8, 32), 4), random_weight(noise, (32, 8, 32), 4, torch.float32))
    )
    wide = QuantWeight(
        torch.zeros(1, 81936, dtype=torch.uint8), torch.ones(1, 1), None, 81936, 4, values="nf4"
    )
    refused: list[tuple[QuantWeight | Segments, str]] = [
        (wide, "81936 columns; GPUs take 81920"),
        (groups, "no multiple of 16"),
        (nan, "1 of 96 codes are NaN"),
        (many, "9 runs of columns; GPUs take 8"),
        (odd, "multiples of 32"),
        (mixed, "scaled in different ways"),
    ]
    for weight, why in refused:
        assert not fits_runs(weight)
        with pytest.raises(ValueError, match=why):
            pack_runs(weight, torch.bfloat16)
