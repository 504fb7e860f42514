"""EXL2 checkpoints, as exllamav2 0.0.1 to 0.3 writes them: 2 to 8 bits mixed inside a matrix.

For a matrix of `in` columns and `out` rows, which are filled up to a multiple of 32 with zeros:
q_weight int32 [words, out], group of columns after group of columns, in each the codes of a row one after another,
lowest bits first, down its column; q_groups int16 [2 · groups], of each group its bits and its first word;
q_scale int32 [groups, out / 8], a scale of 4 bits for each row, less one; q_scale_max float16 [groups];
q_invperm int32 or int16 [in], the place of each column of x among those of the groups, or q_perm, the reverse.

scale = scale4² · (max / 256), where both products are rounded to float16, as the format's kernels do it.
weight = (code − 2^(bits − 1)) · scale; those kernels round it to float16, here it is exact until it meets activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_segments import Segments
from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import (
    Section,
    Tensors,
    read_as,
    read_scales,
    replaces_weight,
    unpack_stream,
)

BITS: Final = (2, 3, 4, 5, 6, 8)
BLOCK: Final = 32  # columns that are packed into whole words, and rows that a matrix is filled up to


@dataclass(frozen=True)
class Run:
    """Groups of one size and width that follow each other."""

    bits: int
    group_size: int
    first_group: int
    groups: int
    first_word: int

    @property
    def words(self) -> slice:
        """Rows of q_weight."""
        return slice(self.first_word, self.first_word + self.groups * self.group_size * self.bits // 32)

    @property
    def of_groups(self) -> slice:
        return slice(self.first_group, self.first_group + self.groups)


@dataclass(frozen=True)
class Exl2:
    """The settings of an EXL2 checkpoint; its matrices say of themselves what they are."""

    bits: float  # on average, as its config says

    @classmethod
    def from_section(cls, section: Section, where: str) -> Exl2:
        bits = section.get("bits", 0)
        if not isinstance(bits, (int, float)) or isinstance(bits, bool) or not 0 <= bits <= 16:
            raise StartupError(f"{where}: bits is {bits!r}; an average from 2 to 8 is needed")
        return cls(float(bits))

    @property
    def title(self) -> str:
        return f"exl2 {self.bits:g} bit" if self.bits else "exl2"

    @property
    def leaf(self) -> str:
        return "q_weight"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return replaces_weight(self.leaf, tensors, name)

    def read(
        self, tensors: Tensors, name: str, out_features: int, in_features: int
    ) -> QuantWeight | Segments:
        if in_features % BLOCK:
            raise StartupError(
                f"{tensors.folder}: {name} has {in_features} columns; exl2 packs blocks of {BLOCK}"
            )
        width = out_features + -out_features % BLOCK
        runs = read_runs(tensors, name, in_features)
        words = _words(tensors, name, (runs[-1].words.stop, width))
        scales = _scales(tensors, name, runs[-1].of_groups.stop, width)
        parts = [_part(words[run.words, :out_features], scales[:out_features], run) for run in runs]
        order = _order(tensors, name, in_features)
        if len(parts) == 1:
            whole = parts[0]
            return QuantWeight(whole.codes, whole.scales, whole.zeros, whole.group_size, whole.bits, order)
        return Segments(tuple(parts), order)


def scales_of(fine: Tensor, largest: Tensor) -> Tensor:
    """Scales in float16, of their shape: fine² · (largest / 256), where both products are rounded.

    fine: [rows, groups], 1 to 16. largest: [groups] float16.
    """
    return (fine.int() * fine.int()).half() * (largest / 256)


def read_runs(tensors: Tensors, name: str, in_features: int) -> list[Run]:
    """What q_groups says, checked against the matrix's number of columns and itself."""
    leaf = f"{name}.q_groups"
    where = f"{tensors.folder}: {leaf}"
    shape = tensors.shape(leaf)
    if len(shape) != 1 or shape[0] == 0 or shape[0] % 2:
        raise StartupError(f"{where} has shape {shape}; two numbers for each group are needed")
    pairs = read_as(tensors, leaf, shape, torch.int16, torch.int32).int().view(-1, 2)
    bits, starts = pairs[:, 0].tolist(), (pairs[:, 1] & 0xFFFF).tolist()
    if unknown := sorted(set(bits) - set(BITS)):
        raise StartupError(f"{where} names codes of {unknown[0]} bits; exl2 has {', '.join(map(str, BITS))}")
    runs: list[Run] = []
    word = column = 0
    for group, (width, start) in enumerate(zip(bits, starts, strict=True)):
        if start != word:
            raise StartupError(
                f"{where}: group {group} begins at word {start}; those before it end at {word}"
            )
        is_last = group + 1 == len(bits)
        size = in_features - column if is_last else (starts[group + 1] - start) * 32 // width
        if (
            size <= 0
            or size * width % 32
            or size % 8
            or (not is_last and (starts[group + 1] - start) * 32 % width)
        ):
            held = "what is left" if is_last else f"{starts[group + 1] - start} words"
            raise StartupError(
                f"{where}: group {group} of {width} bits has {held}, {size} of {in_features} columns; groups are "
                "whole words of 32 bits"
            )
        runs = _joined(runs, Run(width, size, group, 1, word))
        word, column = word + size * width // 32, column + size
    return runs


def _joined(runs: list[Run], group: Run) -> list[Run]:
    """The runs with one group more."""
    if not runs or (runs[-1].bits, runs[-1].group_size) != (group.bits, group.group_size):
        return [*runs, group]
    last = runs[-1]
    longer = Run(last.bits, last.group_size, last.first_group, last.groups + 1, last.first_word)
    return [*runs[:-1], longer]


def _words(tensors: Tensors, name: str, shape: tuple[int, int]) -> Tensor:
    found = tensors.shape(f"{name}.q_weight")
    if found != shape:
        raise StartupError(
            f"{tensors.folder}: {name}.q_weight has shape {found}; by {name}.q_groups and config.json it is {shape}. "
            "The files belong to different models, or one is damaged"
        )
    return read_as(tensors, f"{name}.q_weight", shape, torch.int32)


def _scales(tensors: Tensors, name: str, groups: int, width: int) -> Tensor:
    """[width, groups] float16. Raises StartupError for what float16 cannot hold."""
    packed = read_as(tensors, f"{name}.q_scale", (groups, width // 8), torch.int32)
    largest = read_scales(tensors, f"{name}.q_scale_max", (groups,)).half()
    scales = scales_of(unpack_stream(packed, 4, width).T + 1, largest)
    if bad := int((~scales.isfinite()).sum()):
        raise StartupError(
            f"{tensors.folder}: {bad} of {scales.numel()} scales of {name} leave float16's range; q_scale_max goes "
            f"up to {float(largest.max()):g}"
        )
    return scales


def _part(words: Tensor, scales: Tensor, run: Run) -> QuantWeight:
    """words: [words of the run, out]; scales: [out, all groups]."""
    codes = unpack_stream(words.T, run.bits, run.groups * run.group_size)
    own = scales[:, run.of_groups].contiguous()
    zeros = torch.full(own.shape, 1 << (run.bits - 1), dtype=torch.int16)
    return QuantWeight(codes, own, zeros, run.group_size, run.bits)


def _order(tensors: Tensors, name: str, in_features: int) -> Tensor | None:
    """The column of x for each column of the groups; None if they lie so."""
    found = {
        leaf: _permutation(tensors, f"{name}.{leaf}", in_features)
        for leaf in ("q_invperm", "q_perm")
        if f"{name}.{leaf}" in tensors.names()
    }
    if not found:
        raise StartupError(f"{tensors.folder}: there is neither {name}.q_invperm nor {name}.q_perm")
    order = found["q_perm"] if "q_perm" in found else found["q_invperm"].argsort()
    if "q_invperm" in found and not torch.equal(order.argsort(), found["q_invperm"]):
        raise StartupError(f"{tensors.folder}: {name}.q_perm and {name}.q_invperm contradict each other")
    return None if torch.equal(order, torch.arange(in_features)) else order


def _permutation(tensors: Tensors, leaf: str, count: int) -> Tensor:
    """Sixteen bits are read as they are meant, without a sign."""
    stored = read_as(tensors, leaf, (count,), torch.int16, torch.int32, torch.int64)
    places = stored.long() & 0xFFFF if stored.dtype == torch.int16 else stored.long()
    if not torch.equal(places.sort().values, torch.arange(count)):
        counts = places.clamp(-1, count).add(1).bincount(minlength=count + 2)
        outside, twice = int(counts[0] + counts[-1]), int((counts[1:-1] > 1).sum())
        raise StartupError(
            f"{tensors.folder}: {leaf} is no order of {count} columns: {outside} of its numbers lie outside, {twice} "
            "are there more than once"
        )
    return places
