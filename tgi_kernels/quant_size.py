"""How much memory a matrix of a few bits takes once it is laid out for its kernels, without making it.

Plain numbers, no torch: a front end plans with it. `tests/kernels/test_quant_size.py` compares with what is then made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# What a code stands for: itself, or a number of a table.
Values = Literal["integer", "nf4", "fp4", "e2m1", "e4m3"]

# How a format rounds what it multiplies with a matrix: not at all; to 8 bits of the matrix's kind, with a scale a token
# (or a stored one) or a block of 128 columns; or in another way, which no kernel knows. Where none does, inputs stay as
# they are, which is nearer to the model that was quantised.
Inputs = Literal["exact", "rows", "blocks", "other"]

_CPU_PANEL: Final = 32  # rows, and codes of a row, that lie together
_CPU_QUAD: Final = 4  # codes of a row that lie together where x is rounded to int8
_CPU_TABLE_BYTES: Final = 64
_GPU_EDGE: Final = 64  # rows of a strip, columns of a piece
_FP8_BLOCK: Final = 128  # rows and columns that share a scale
_FP8_VECTOR: Final = 16  # columns
_GPU_BLOCK: Final = 128  # columns that lie together, beside pieces
# Products of at most so many tokens widen codes in registers; for more, the dense matrix is quicker made first.
FUSED_PIECES_TOKENS: Final = 1024  # weights that `takes_pieces` is true of
FUSED_RUNS_TOKENS: Final = 64  # all others
MAX_RUNS: Final = 8  # of columns of different widths, on GPUs
MAX_INT8_COLUMNS: Final = 65_535  # whose products with x in int8 fit a sum of 32 bits
MAX_COLUMNS: Final = 80 * 1024  # of x, an eighth of which shared memory holds for 8 tokens
# How weights are scaled on GPUs, see csrc/quant/runs.h.
Scaling = Literal["half", "brain", "half_zeros", "brain_zeros", "single", "offset", "zero"]


@dataclass(frozen=True)
class QuantKind:
    """What a QuantWeight is, beside its shape and its numbers."""

    bits: float  # not whole: the mean of a matrix whose runs of columns differ, which `is_mixed`
    group_size: int  # columns that share a scale; -1: all
    values: Values = "integer"
    zeros: Literal["none", "one", "many"] = "one"  # one: the same for all groups
    scale_bytes: int = 2  # of a scale, 2 or 4
    offset_bytes: int = 0  # of an offset; 2 where float16 holds all, 0 without any
    is_ordered: bool = False
    is_mixed: bool = False
    inputs: Inputs = "exact"

    def size(self, columns: int) -> int:
        """Columns that share a scale, of so many."""
        return columns if self.group_size == -1 else self.group_size


def packed_bytes(kind: QuantKind, rows: int, columns: int, *, on_gpu: bool) -> int | None:
    """What `pack_quant` makes of rows · columns codes; None if no kernel takes them, see `fits_kernels`."""
    order = 4 * columns if kind.is_ordered else 0
    if on_gpu:
        packed = _gpu_bytes(kind, rows, columns)
        return None if packed is None else packed + order
    if takes_int8(kind, columns):
        panels, quads = -(-rows // _CPU_PANEL), -(-columns // _CPU_QUAD)
        return panels * _CPU_PANEL * (_CPU_QUAD * quads + 4)
    table = 0 if kind.values in ("integer", "e4m3") else _CPU_TABLE_BYTES
    return _cpu_bytes(kind, rows, columns) + order + table


def takes_int8(kind: QuantKind, columns: int) -> bool:
    """Whether CPUs multiply such a weight by x in int8, see int8."""
    return (
        kind.inputs == "rows"
        and (kind.values, kind.bits, kind.zeros) == ("integer", 8, "one")
        and kind.size(columns) == columns <= MAX_INT8_COLUMNS
        and not kind.is_ordered
    )


def _cpu_bytes(kind: QuantKind, rows: int, columns: int) -> int:
    bits, shift_bytes = kind.bits, kind.offset_bytes
    if kind.zeros == "many" and kind.scale_bytes == 2:
        shift_bytes = 2
    elif kind.zeros == "many":
        bits += 1  # zeros are taken off the codes: their products with scales are not exact
    panels, runs = -(-rows // _CPU_PANEL), -(-columns // _CPU_PANEL)
    groups = columns // kind.size(columns)
    return panels * _CPU_PANEL * round(runs * 4 * bits + groups * (kind.scale_bytes + shift_bytes))


def stored_bits(bits: int) -> int:
    """Bits that a code takes on GPUs."""
    return 8 if bits == 7 else bits


def takes_pieces(kind: QuantKind, columns: int) -> bool:
    """Whether GPUs multiply such a weight by the kernels for 4 and 8 bits, see quant_cuda."""
    size = kind.size(columns)
    return (
        not kind.is_mixed
        and kind.bits in (4, 7, 8)
        and kind.zeros != "none"
        and kind.scale_bytes == 2
        and (size % 16 == 0 or size == columns)
    )


def scaling_of(
    values: Values,
    zeros: Literal["none", "one", "many"],
    scale_bytes: int,
    size: int,
    columns: int,
    *,
    has_offsets: bool,
    is_brain: bool = False,
) -> Scaling | None:
    """How GPUs scale a weight of any kind in groups of `size` columns; None: not at all."""
    if (size % 16 and size != columns) or (has_offsets and values != "integer") or columns > MAX_COLUMNS:
        return None
    if has_offsets:
        return "offset"
    if zeros != "none" and scale_bytes == 2 and (size % 32 == 0 or size == columns):
        if zeros == "one":
            return "brain" if is_brain else "half"
        return "brain_zeros" if is_brain else "half_zeros"
    return "zero" if zeros == "many" else "single"


def _gpu_bytes(kind: QuantKind, rows: int, columns: int) -> int | None:
    size = kind.size(columns)
    if kind.inputs != "exact" and (packed := _fp8_bytes(kind, rows, columns)) is not None:
        return packed
    strips, pieces = -(-rows // _GPU_EDGE), -(-columns // _GPU_EDGE)
    if takes_pieces(kind, columns):
        groups = 1 if size == columns else -(-pieces * _GPU_EDGE // size)
        whole = 4 if kind.bits == 4 else 8
        return strips * _GPU_EDGE * (pieces * _GPU_EDGE * whole // 8 + 4 * groups)
    scaling = scaling_of(
        kind.values, kind.zeros, kind.scale_bytes, size, columns, has_offsets=kind.offset_bytes > 0
    )
    if scaling is None:
        return None
    filled = -(-columns // _GPU_BLOCK) * _GPU_BLOCK
    groups = 1 if size == columns else -(-filled // size)
    bits = kind.bits if kind.is_mixed else stored_bits(round(kind.bits))
    scale_bytes = 2 if scaling in ("half", "brain") else 8 if scaling in ("offset", "zero") else 4
    return strips * _GPU_EDGE * (round(filled * bits / 8) + scale_bytes * groups)


def _fp8_bytes(kind: QuantKind, rows: int, columns: int) -> int | None:
    """Of matrices whose inputs are rounded, too."""
    groups = columns // kind.size(columns)
    if kind.values != "e4m3" or columns % _FP8_VECTOR:
        return None
    if kind.inputs == "rows":
        return rows * columns + 4 * rows if groups == 1 else None
    if rows % _FP8_BLOCK or (groups > 1 and kind.group_size != _FP8_BLOCK):
        return None
    return rows * columns + 4 * (rows // _FP8_BLOCK) * (-(-groups // 4) * 4)
