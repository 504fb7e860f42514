"""bitsandbytes' layouts: NF4 with double quantisation, and LLM.int8."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels.quant_weight import table
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.quantization.bitsandbytes import STATE, EightBit, FourBit
from tgi_server.quantization.rounding import nearest_codes
from tgi_server.quantize.solve import Solution
from tgi_server.quantize.table_grid import TableGrid

_BLOCKS: Final = (64, 32)  # numbers that share a scale; 64 where it divides a row
_NESTED_BLOCK: Final = 256  # scales that share a scale
_TURNS: Final = 3  # of codes beside the scales that are stored; the first makes up for most of their rounding
_SECTION: Final[Mapping[str, object]] = {
    "quant_method": "bitsandbytes",
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_has_fp16_weight": False,
}


@dataclass(frozen=True)
class FourBitMethod:
    """NF4. dtype: of the model it is made of, which other programs compute in."""

    dtype: str
    needs_statistics: bool = True

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> FourBitMethod:
        config = ModelConfig.from_folder(args.model).raw
        return cls(str(config.get("dtype", config.get("torch_dtype", "float32"))))

    @property
    def scheme(self) -> FourBit:
        return FourBit("nf4", is_double=True)

    def check(self, where: str, in_features: int) -> None:
        if in_features % _BLOCKS[-1]:
            raise StartupError(
                f"{where} has {in_features} columns; nf4 is written for multiples of {_BLOCKS[-1]}, whose rows end "
                "where blocks do"
            )

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        weight = torch.cat(list(matrices.values()))
        columns = weight.shape[1]
        block = next(size for size in _BLOCKS if columns % size == 0)
        inputs = torch.eye(columns) if hessian is None else hessian
        order = inputs.diagonal().argsort(descending=True)
        solution = Solution(weight, inputs, order, TableGrid(table("nf4"), block))
        solution.improve()
        rows = [len(matrix) for matrix in matrices.values()]
        nested = [_Scales.of(part) for part in solution.scales.split(rows)]
        # Codes that are best beside the scales as they are stored, no longer beside those that were found.
        solution.scales = torch.cat([scales.read() for scales in nested])
        for _ in range(_TURNS):
            solution.descend()
        codes = torch.searchsorted(table("nf4"), solution.codes).to(torch.uint8)
        return {
            f"{name}.{leaf}": tensor
            for name, part, scales in zip(matrices, codes.split(rows), nested, strict=True)
            for leaf, tensor in (self._packed(part, block, scales) | scales.stored()).items()
        }

    def section(self) -> dict[str, object]:
        return {
            **_SECTION,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
        }

    def _packed(self, codes: Tensor, block: int, scales: _Scales) -> dict[str, Tensor]:
        """What is stored beside the scales, by leaf. codes: [out, in]."""
        state = {
            "quant_type": "nf4",
            "blocksize": block,
            "dtype": self.dtype,
            "shape": list(codes.shape),
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": scales.offset,
        }
        flat = codes.flatten()
        return {
            "weight": (flat[::2] << 4 | flat[1::2]).unsqueeze(1),
            "weight.quant_map": table("nf4"),
            f"{STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }


@dataclass(frozen=True)
class _Scales:
    """Scales of a matrix, quantised themselves: numbers[codes] · largest of their block + offset."""

    codes: Tensor  # [out, groups] uint8
    largest: Tensor  # [⌈out · groups / 256⌉] float32
    offset: float
    numbers: Tensor  # [256] float32

    @classmethod
    def of(cls, scales: Tensor) -> _Scales:
        """scales: [out, groups] float32."""
        numbers, offset = dynamic_map(), float(scales.mean())
        flat = scales.flatten() - offset
        blocks = functional.pad(flat, (0, -len(flat) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
        largest = blocks.abs().amax(1)
        codes = nearest_codes(blocks, largest, numbers).flatten()[: len(flat)]
        return cls(codes.view_as(scales), largest, offset, numbers)

    def read(self) -> Tensor:
        """[out, groups] float32."""
        spread = self.largest.repeat_interleave(_NESTED_BLOCK)[: self.codes.numel()].view(self.codes.shape)
        return self.numbers[self.codes.long()] * spread + torch.tensor(self.offset)

    def stored(self) -> dict[str, Tensor]:
        return {
            "weight.absmax": self.codes.flatten(),
            "weight.nested_absmax": self.largest,
            "weight.nested_quant_map": self.numbers,
        }


@dataclass(frozen=True)
class EightBitMethod:
    """LLM.int8's weights."""

    needs_statistics: bool = False

    @classmethod
    def from_arguments(cls, _args: argparse.Namespace) -> EightBitMethod:
        return cls()

    @property
    def scheme(self) -> EightBit:
        return EightBit()

    def check(self, where: str, in_features: int) -> None:
        """Every matrix has rows."""

    def quantise(self, matrices: Mapping[str, Tensor], _hessian: Tensor | None) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            largest = matrix.abs().amax(1)
            steps = matrix * (127 / largest.clamp(min=1e-30)).unsqueeze(1)
            tensors[f"{name}.weight"] = steps.round().to(torch.int8)
            tensors[f"{name}.SCB"] = largest
            tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)  # in rows
        return tensors

    def section(self) -> dict[str, object]:
        return {**_SECTION, "load_in_4bit": False, "load_in_8bit": True}


def dynamic_map() -> Tensor:
    """256 numbers from -1 to 1, the denser the nearer to 0. Dettmers 2015, arXiv:1511.04561.

    Seven decades, the largest of 64 numbers of each sign, each below it of half as many; and 0 and 1.
    """
    parts = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 << decade) + 1, dtype=torch.float64) * 10.0 ** (decade - 6)
        middles = ((edges[1:] + edges[:-1]) / 2).float()
        parts += [middles, -middles]
    return torch.cat(parts).sort().values
