"""AWQ checkpoints, 4 bits in the GEMM packing. Lin et al. 2023, arXiv:2306.00978.

For a matrix of `in` columns: qweight int32 [in, out / 8]; qzeros int32 [groups, out / 8]; scales [groups, out].
The eight codes of a word belong to outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight, lowest bits first.
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
    pack_stream,
    read_as,
    read_scales,
    replaces_weight,
    unpack_stream,
)

_PLACE_OF_OUTPUT: Final = (0, 4, 1, 5, 2, 6, 3, 7)
_OUTPUT_OF_PLACE: Final = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq:
    """The settings of an AWQ checkpoint."""

    group_size: int

    @classmethod
    def from_section(cls, section: Section, where: str) -> Awq:
        lower = {key: value.lower() if isinstance(value, str) else value for key, value in section.items()}
        choice(lower, "version", ("gemm",), "gemm", where)
        choice(section, "w_bit" if "w_bit" in section else "bits", (4,), 4, where)
        return cls(
            group_size_of(section, "q_group_size" if "q_group_size" in section else "group_size", where)
        )

    def section(self) -> dict[str, object]:
        """The `quantization_config` that says this."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """A matrix as it is stored, by leaf. codes: [out, in] uint8; scales, zeros: [out, groups]."""
        return {
            "qweight": _pack(codes.T),
            "qzeros": _pack(zeros.to(torch.uint8).T),
            "scales": scales.T.contiguous(),
        }

    @property
    def title(self) -> str:
        return f"awq 4 bit{'' if self.group_size == -1 else f' g{self.group_size}'}"

    @property
    def leaf(self) -> str:
        return "qweight"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return replaces_weight(self.leaf, tensors, name)

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        where = f"{tensors.folder}: {name}"
        groups, size = group_count(where, in_features, self.group_size)
        if out_features % 8:
            raise StartupError(f"{where} has {out_features} rows; awq packs eight to a word")
        words = read_as(tensors, f"{name}.qweight", (in_features, out_features // 8), torch.int32)
        zeros = read_as(tensors, f"{name}.qzeros", (groups, out_features // 8), torch.int32)
        scales = read_scales(tensors, f"{name}.scales", (groups, out_features)).T
        return QuantWeight(_unpack(words).T, scales, _unpack(zeros).short().T, size, 4)


def _pack(codes: Tensor) -> Tensor:
    """The reverse of `_unpack`: [rows, out] uint8 to [rows, out / 8] int32."""
    return pack_stream(codes.unflatten(1, (-1, 8))[:, :, list(_OUTPUT_OF_PLACE)].flatten(1), 4)


def _unpack(words: Tensor) -> Tensor:
    """[rows, out / 8] int32 to [rows, out] uint8."""
    codes = unpack_stream(words, 4, words.shape[1] * 8)
    ordered: Tensor = codes.unflatten(1, (-1, 8))[:, :, list(_PLACE_OF_OUTPUT)]
    return ordered.flatten(1)
