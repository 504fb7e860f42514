"""Products with weights of every kind on NVIDIA GPUs: 2 to 8 bits, floats of 4 and 8, and runs of columns of several.

csrc/quant/kinds.cuh draws the layout, csrc/quant/runs.h names the ways to scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_dtype, check_shape
from tgi_kernels._library import ops
from tgi_kernels.columns import gather_columns
from tgi_kernels.hopper_matmul import takes
from tgi_kernels.matmul import linear, pack_linear
from tgi_kernels.quant_segments import Segments
from tgi_kernels.quant_size import MAX_COLUMNS, MAX_RUNS, Scaling, scaling_of, stored_bits
from tgi_kernels.quant_weight import QuantWeight, table

STRIP: Final = 64  # rows that lie together
BLOCK: Final = 128  # columns that lie together
_TABLE, _E4M3 = 16, 17  # of kinds.cuh's Codes; integers are named by their bits
# In the order of runs.h.
_SCALINGS: Final[tuple[Scaling, ...]] = (
    "half", "brain", "half_zeros", "brain_zeros", "single", "offset", "zero",
)  # fmt: skip
_NAN: Final = 0x7F  # of e4m3, beside its sign


@dataclass(frozen=True)
class PackedRuns:
    """A weight in the layout of the GPU kernels, for activations of `dtype`; made by `pack_runs`."""

    words: Tensor  # int32, run after run [strips, blocks, 256 · bits]
    scales: Tensor  # int32, run after run [strips, groups, quarters, 8, 1, 2 or 4]
    runs: Tensor  # int64 [runs, 4] on the host: kind of codes, columns, group size, zero point of all groups
    scaling: int
    table: Tensor | None  # float32 [16] on the host: the numbers of codes
    table_scale: float  # that they are multiplied by before they are rounded to operands
    dtype: torch.dtype
    out_features: int
    in_features: int
    order: Tensor | None
    most_fused: int | None = None  # tokens up to which codes are widened in registers; None: always


def fits_runs(weight: QuantWeight | Segments) -> bool:
    """Whether `pack_runs` takes it."""
    return _misfit(weight) is None


def pack_runs(weight: QuantWeight | Segments, dtype: torch.dtype) -> PackedRuns:
    """Lays a weight out for `runs_matmul`, on its device. dtype: of activations, float16 or bfloat16.

    Raises ValueError for what `fits_runs` refuses.
    """
    if (misfit := _misfit(weight)) is not None:
        raise ValueError(f"{misfit}; `dequantise` the weight")
    parts = _parts(weight)
    scaling = _scaling(parts[0])
    assert scaling is not None
    packed = [_packed_run(part, scaling, is_last=part is parts[-1]) for part in parts]
    values = parts[0].values
    numbers = None if values in ("integer", "e4m3") else table(values)
    return PackedRuns(
        words=torch.cat([words for words, _, _ in packed]),
        scales=torch.cat([scales for _, scales, _ in packed]),
        runs=torch.tensor([fields for _, _, fields in packed], dtype=torch.int64),
        scaling=_SCALINGS.index(scaling),
        table=numbers,
        table_scale=1.0 if numbers is None else _table_scale(numbers, dtype),
        dtype=dtype,
        out_features=len(parts[0].codes),
        in_features=sum(part.codes.shape[1] for part in parts),
        order=None if weight.order is None else weight.order.int(),
    )


def runs_matmul(
    x: Tensor,
    packed: PackedRuns,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias; then residual + y.

    x: [tokens, in_features]; bias: [out_features]; residual: like y, may be out. All of packed.dtype on one GPU.
    out: [tokens, out_features], allocated when not given. Returns out.
    On Hopper sums of exact products are scaled in float32, and bits do not depend on the number of tokens, of which
    16 are computed at once. On other GPUs, and for rows of x that do not lie multiples of 16 bytes apart, the dense
    matrix is made for the product.
    """
    check_shape("x", x, ("tokens", packed.in_features))
    check_dtype("x", x, packed.dtype)
    if packed.order is not None:
        x = gather_columns(x, packed.order)
    if out is None:
        out = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype, device=x.device)
    check_alike("out", out, "x", x)
    if not takes(x, x):
        dense = pack_linear(dequantise_runs(packed))
        return linear(x, dense, bias, residual=residual, out=out)
    ops.quant_matmul_runs(
        x,
        packed.words,
        packed.scales,
        packed.runs,
        packed.scaling,
        packed.table,
        packed.table_scale,
        bias,
        residual,
        out,
    )
    return out


def dequantise_runs(packed: PackedRuns) -> Tensor:
    """The dense matrix [out_features, in_features] in packed.dtype, columns in the order of the codes."""
    shape = (packed.out_features, packed.in_features)
    out = torch.empty(shape, dtype=packed.dtype, device=packed.words.device)
    ops.quant_dequantise_runs(packed.words, packed.scales, packed.runs, packed.scaling, packed.table, out)
    return out


def _parts(weight: QuantWeight | Segments) -> tuple[QuantWeight, ...]:
    return weight.parts if isinstance(weight, Segments) else (weight,)


def _misfit(weight: QuantWeight | Segments) -> str | None:
    """Why the kernels cannot hold a weight; None: they can."""
    parts = _parts(weight)
    if len(parts) > MAX_RUNS:
        return f"{len(parts)} runs of columns; GPUs take {MAX_RUNS}"
    if (columns := sum(part.codes.shape[1] for part in parts)) > MAX_COLUMNS:
        return f"{columns} columns; GPUs take {MAX_COLUMNS}"
    scalings = {_scaling(part) for part in parts}
    if None in scalings:
        return "groups that are no multiple of 16 columns, or a table's numbers and offsets"
    if len(parts) > 1 and (len(scalings) > 1 or scalings & {"single", "offset", "zero"}):
        return f"runs of columns that are scaled in different ways, or in fp32: {sorted(map(str, scalings))}"
    if any(part.codes.shape[1] % 32 for part in parts[:-1]):
        return f"runs of {[part.codes.shape[1] for part in parts]} columns; GPUs take multiples of 32"
    return _nan_codes(parts[0])


def _nan_codes(weight: QuantWeight) -> str | None:
    bad = int(((weight.codes & _NAN) == _NAN).sum()) if weight.values == "e4m3" else 0
    return f"{bad} of {weight.codes.numel()} codes are NaN" if bad else None


def _scaling(weight: QuantWeight) -> Scaling | None:
    zeros = weight.zeros
    is_one = zeros is not None and torch.equal(zeros, zeros[:1, :1].expand_as(zeros))
    return scaling_of(
        weight.values,
        "none" if zeros is None else "one" if is_one else "many",
        weight.scales.dtype.itemsize,
        weight.group_size,
        weight.codes.shape[1],
        has_offsets=weight.offsets is not None,
        is_brain=weight.scales.dtype == torch.bfloat16,
    )


def _packed_run(weight: QuantWeight, scaling: Scaling, *, is_last: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Words and scales of a run, flat, and its row of `PackedRuns.runs`."""
    columns = weight.codes.shape[1]
    bits = stored_bits(weight.bits)
    blocks = -(-columns // BLOCK)
    size = weight.group_size
    if is_last and size == columns:
        size = blocks * BLOCK  # x is zero where there are no more columns
    groups = -(-blocks * BLOCK // size)
    has_one = scaling in ("half", "brain", "single")
    zero = int(weight.zeros[0, 0]) if has_one and weight.zeros is not None else 0
    kind = {"integer": bits, "e4m3": _E4M3}.get(weight.values, _TABLE)
    words = _words(weight.codes, bits, is_table=kind == _TABLE)
    return words, _scales(weight, scaling, groups), [kind, columns, size, zero]


def _words(codes: Tensor, bits: int, *, is_table: bool) -> Tensor:
    """Codes [out_features, in_features] to words [strips · blocks · 256 · bits] in the order of lanes' operands."""
    padded = functional.pad(codes, (0, -codes.shape[1] % BLOCK, 0, -codes.shape[0] % STRIP))
    strips, blocks = padded.shape[0] // STRIP, padded.shape[1] // BLOCK
    # rows: strip, quarter, h, g; columns: block, step, c, t, e
    parts = padded.view(strips, 4, 2, 8, blocks, 8, 2, 4, 2)
    strip, quarter, h, g, block, step, c, t, e = range(9)
    slots = parts.permute(e, step, c, h, strip, block, quarter, g, t).reshape(2, 32, strips, blocks, 4, 32)
    words = torch.zeros((2 * bits, *slots.shape[2:]), dtype=torch.int32, device=codes.device)
    for slot in range(32):
        for second in range(2):
            if is_table:
                words[slot // 4] |= slots[second, slot].int() << (slot % 4 * 8 + 4 * second)
            else:
                _put(words, slots[second, slot].int(), bits, slot, 16 * second)
    whole = bits // 2  # loads of four words
    loads = words[: 4 * whole].unflatten(0, (whole, 4)).permute(2, 3, 0, 4, 5, 1).flatten(2)
    last = words[4 * whole :].permute(1, 2, 3, 4, 0).flatten(2)
    return torch.cat([loads, last], 2).flatten()


def _put(words: Tensor, codes: Tensor, bits: int, slot: int, half: int) -> None:
    """Sets the bits of a slot's codes; `half`: 0 or 16, the first bit of the half they go to."""
    fields = 16 // bits
    whole = 2 * bits * fields
    if slot < whole:
        words[slot // fields] |= codes << (half + slot % fields * bits)
    elif bits == 6:
        three, odd = (slot - whole) // 2 * 3, slot % 2
        words[three + 2 * odd] |= (codes & 15) << (half + 12)
        words[three + 1] |= (codes >> 4) << (half + 12 + 2 * odd)
    else:
        for bit in range(bits):
            words[(slot - whole) * bits + bit] |= ((codes >> bit) & 1) << (half + 15)


def _scales(weight: QuantWeight, scaling: Scaling, groups: int) -> Tensor:
    """[strips · groups · 4 · 8 · 1, 2 or 4] words; zeros for groups and rows that are not there."""
    own = [weight.scales.float()]
    if scaling == "offset" and weight.offsets is not None:
        own.append(weight.offsets)
    elif scaling == "zero" and weight.zeros is not None:
        own.append(weight.zeros.float())
    if scaling in ("half", "brain", "half_zeros", "brain_zeros"):
        kinds = (weight.scales.contiguous().view(torch.int16).int() & 0xFFFF).unsqueeze(1)
        if scaling in ("half_zeros", "brain_zeros") and weight.zeros is not None:
            kinds |= weight.zeros.int().unsqueeze(1) << 16
    else:
        kinds = torch.stack(own, 1).contiguous().view(torch.int32)
    rows, count, present = kinds.shape
    padded = functional.pad(kinds, (0, groups - present, 0, 0, 0, -rows % STRIP))
    # strips, quarters, h, g, kinds, groups
    words = padded.view(-1, 4, 2, 8, count, groups).permute(0, 5, 1, 3, 4, 2)
    if scaling in ("half", "brain"):
        words = words[..., 0] | words[..., 1] << 16
    return words.flatten()


def _table_scale(numbers: Tensor, dtype: torch.dtype) -> float:
    """The factor from 1 to 2 with which a table's numbers lose least when they are rounded to `dtype`."""
    factors = 1 + torch.arange(1024, dtype=torch.float64)[:, None] / 1024
    scaled = numbers.double() * factors
    lost = ((scaled.to(dtype).double() - scaled) / factors).square().sum(1)
    return float(factors[lost.argmin(), 0])
