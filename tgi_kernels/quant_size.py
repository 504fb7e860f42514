"""How much memory a matrix of a few bits takes once it is laid out for its kernels, without making it.

Plain numbers, no torch: a front end plans with it. `tests/kernels/test_quant_size.py` compares with what is then made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# What a code stands for: itself, or a number of a table.
Values = Literal["integer", "nf4", "fp4", "e2m1", "e4m3"]

_CPU_PANEL: Final = 32  # rows, and codes of a row, that lie together
_CPU_TABLE_BYTES: Final = 64
_GPU_EDGE: Final = 64  # rows of a strip, columns of a piece


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

    def size(self, columns: int) -> int:
        """Columns that share a scale, of so many."""
        return columns if self.group_size == -1 else self.group_size


def packed_bytes(kind: QuantKind, rows: int, columns: int, *, on_gpu: bool) -> int | None:
    """What `pack_quant` makes of rows · columns codes; None if no kernel takes them, see `fits_kernels`."""
    order = 8 * columns if kind.is_ordered else 0
    if on_gpu:
        packed = _gpu_bytes(kind, rows, columns)
        return None if packed is None else packed + order
    table = 0 if kind.values in ("integer", "e4m3") else _CPU_TABLE_BYTES
    return _cpu_bytes(kind, rows, columns) + order + table


def _cpu_bytes(kind: QuantKind, rows: int, columns: int) -> int:
    bits, shift_bytes = kind.bits, kind.offset_bytes
    if kind.zeros == "many" and kind.scale_bytes == 2:
        shift_bytes = 2
    elif kind.zeros == "many":
        bits += 1  # zeros are taken off the codes: their products with scales are not exact
    panels, runs = -(-rows // _CPU_PANEL), -(-columns // _CPU_PANEL)
    groups = columns // kind.size(columns)
    return panels * _CPU_PANEL * round(runs * 4 * bits + groups * (kind.scale_bytes + shift_bytes))


def _gpu_bytes(kind: QuantKind, rows: int, columns: int) -> int | None:
    size = kind.size(columns)
    if kind.is_mixed or kind.zeros == "none" or kind.scale_bytes != 2 or (size % 16 and size != columns):
        return None
    bits = 4 if kind.bits <= 4 else 8
    strips, pieces = -(-rows // _GPU_EDGE), -(-columns // _GPU_EDGE)
    groups = 1 if size == columns else -(-pieces * _GPU_EDGE // size)
    return strips * _GPU_EDGE * (pieces * _GPU_EDGE * bits // 8 + 4 * groups)
