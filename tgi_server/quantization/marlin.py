"""GPTQ checkpoints in the order that the Marlin kernel reads. Frantar et al. 2024, arXiv:2408.11743.

For a matrix of `in` columns and `out` rows, 4 bits, symmetric: B int32 [in / 16, 2 · out], scales s [groups, out].
A row of B holds 16 columns: for every 64 rows 32 threads, of each 4 words, of each 8 codes, as the operands of
mma.m16n8k16 lie in registers. Of thread t, word w and nibble p (= 4 · low + 2 · half + high) the code belongs to
row 16 · w + 8 · half + t / 4 and column 2 · (t mod 4) + low + 8 · high. Scales lie as accumulators do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import (
    Section,
    Tensors,
    choice,
    group_count,
    group_size_of,
    read_as,
    read_scales,
    replaces_weight,
    unpack_stream,
)

_COLUMNS: Final = 16  # of a tile
_ROWS: Final = 64  # that 32 threads hold together


@dataclass(frozen=True)
class Marlin:
    """The settings of a checkpoint in Marlin's order."""

    group_size: int

    @classmethod
    def from_section(cls, section: Section, where: str) -> Marlin:
        choice(section, "bits", (4,), 4, where)
        choice(section, "sym", (True,), True, where)
        choice(section, "desc_act", (False,), False, where)
        return cls(group_size_of(section, "group_size", where))

    @property
    def title(self) -> str:
        return f"gptq 4 bit{'' if self.group_size == -1 else f' g{self.group_size}'} marlin"

    @property
    def leaf(self) -> str:
        return "B"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return replaces_weight(self.leaf, tensors, name)

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        where = f"{tensors.folder}: {name}"
        groups, size = group_count(where, in_features, self.group_size)
        if in_features % _COLUMNS or out_features % _ROWS:
            raise StartupError(
                f"{where} has {in_features} columns and {out_features} rows; marlin packs "
                f"tiles of {_COLUMNS} and {_ROWS}"
            )
        shape = (in_features // _COLUMNS, 2 * out_features)
        codes = _codes(read_as(tensors, f"{name}.B", shape, torch.int32))
        scales = _scales(read_scales(tensors, f"{name}.s", (groups, out_features)))
        return QuantWeight(codes, scales, torch.full(scales.shape, 8, dtype=torch.int16), size, 4)


def _codes(words: Tensor) -> Tensor:
    """[in / 16, 2 · out] int32 to [out, in] uint8."""
    tiles = len(words)
    nibbles = unpack_stream(words, 4, words.shape[1] * 8)
    # thread = (row of 8, pair of columns), word, nibble = (low, half, high)
    split = nibbles.view(tiles, -1, 8, 4, 4, 2, 2, 2)
    tile, row64, row, pair, word, low, half, high = range(8)
    codes: Tensor = split.permute(row64, word, half, row, tile, high, pair, low)
    return codes.reshape(-1, tiles * _COLUMNS)


def _scales(stored: Tensor) -> Tensor:
    """[groups, out] to [out, groups]: what is stored for 64 rows together, or 32 of a single group, in their order."""
    groups, out = stored.shape
    split = stored.view(groups, -1, 4, 4, 2) if groups == 1 else stored.view(groups, -1, 8, 8, 1)
    return split.transpose(2, 3).reshape(groups, out).T.contiguous()
