"""GPTQ checkpoints: 2, 3, 4 and 8 bits, with zero points, columns in any order. Frantar et al. 2022, arXiv:2210.17323.

For a matrix of `in` columns: qweight int32 [in · bits / 32, out], codes one after another down each column;
qzeros int32 [groups, out · bits / 32], less one in the first version of the format; scales [groups, out];
g_idx int32 [in], the group of each column, if columns were quantised in order of their activation (desc_act).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

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
    pack_stream,
    read_as,
    read_scales,
    replaces_weight,
    unpack_stream,
)


@dataclass(frozen=True)
class Gptq:
    """The settings of a GPTQ checkpoint. `zero_shift`: what is added to stored zero points."""

    bits: int
    group_size: int
    is_symmetric: bool
    orders_columns: bool
    zero_shift: int

    @classmethod
    def from_section(cls, section: Section, where: str) -> Gptq:
        version = choice(
            section, "checkpoint_format", ("gptq", "gptq_v2"), section.get("format") or "gptq", where
        )
        choice(section, "pack_dtype", ("int32",), "int32", where)
        return cls(
            bits=cast(int, choice(section, "bits", (2, 3, 4, 8), 4, where)),
            group_size=group_size_of(section, "group_size", where),
            is_symmetric=choice(section, "sym", (True, False), True, where) is True,
            orders_columns=choice(section, "desc_act", (True, False), False, where) is True,
            zero_shift=0 if version == "gptq_v2" else 1,
        )

    def section(self) -> dict[str, object]:
        """The `quantization_config` that says this."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.is_symmetric,
            "desc_act": self.orders_columns,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.zero_shift else "gptq_v2",
            "pack_dtype": "int32",
        }

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> dict[str, Tensor]:
        """A matrix as it is stored, by leaf.

        codes: [out, in] uint8. scales, zeros: [out, groups] float16 and int16. group_of: [in], of each column.
        """
        return {
            "qweight": pack_stream(codes, self.bits).T.contiguous(),
            "qzeros": pack_stream((zeros.T - self.zero_shift).to(torch.uint8), self.bits),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.int(),
        }

    @property
    def title(self) -> str:
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        return f"gptq {self.bits} bit{group}{' desc_act' if self.orders_columns else ''}"

    @property
    def leaf(self) -> str:
        return "qweight"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return replaces_weight(self.leaf, tensors, name)

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        where = f"{tensors.folder}: {name}"
        groups, size = group_count(where, in_features, self.group_size)
        if in_features * self.bits % 32 or out_features * self.bits % 32:
            raise StartupError(
                f"{where} has {in_features} columns and {out_features} rows of {self.bits} bits; gptq packs "
                "whole words of 32 bits"
            )
        words = read_as(
            tensors, f"{name}.qweight", (in_features * self.bits // 32, out_features), torch.int32
        )
        codes = unpack_stream(words.T, self.bits, in_features)
        scales = read_scales(tensors, f"{name}.scales", (groups, out_features)).T
        order = self._order(tensors, name, groups, size)
        if order is not None:
            codes = codes.index_select(1, order)
        zeros = self._zeros(tensors, name, groups, out_features)
        return QuantWeight(codes, scales, zeros, size, self.bits, order)

    def _zeros(self, tensors: Tensors, name: str, groups: int, out_features: int) -> Tensor:
        shape = (groups, out_features * self.bits // 32)
        packed = read_as(tensors, f"{name}.qzeros", shape, torch.int32)
        zeros = unpack_stream(packed, self.bits, out_features).short().T + self.zero_shift
        middle = 1 << (self.bits - 1)
        if self.is_symmetric and (wrong := int((zeros != middle).sum())):
            found = sorted({int(zero) for zero in zeros.unique()})
            raise StartupError(
                f"{tensors.folder}: config says sym, so zero points are {middle}, but {wrong} of {zeros.numel()} in "
                f"{name}.qzeros are not (found {found[:4]}); checkpoint_format or sym in its config is wrong"
            )
        return zeros

    def _order(self, tensors: Tensors, name: str, groups: int, size: int) -> Tensor | None:
        """The columns group by group; None if they lie so."""
        leaf = f"{name}.g_idx"
        if leaf not in tensors.names():
            if self.orders_columns:
                raise StartupError(f"{tensors.folder}: config says desc_act, but there is no {leaf}")
            return None
        group_of = read_as(tensors, leaf, (groups * size,), torch.int32, torch.int64).long()
        if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise StartupError(
                f"{tensors.folder}: {leaf} names groups {int(group_of.min())} to {int(group_of.max())}; "
                f"there are {groups}"
            )
        counts = group_of.bincount(minlength=groups)
        if bool((counts != size).any()):
            odd = int((counts != size).nonzero()[0])
            raise StartupError(
                f"{tensors.folder}: {leaf} puts {int(counts[odd])} columns into group {odd}; group_size is {size}"
            )
        order = group_of.argsort(stable=True)
        if torch.equal(order, torch.arange(len(order))):
            return None
        if not self.orders_columns:
            raise StartupError(
                f"{tensors.folder}: {leaf} puts columns in another order, but config says desc_act is false; one of "
                "the two is wrong"
            )
        return order
