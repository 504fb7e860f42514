"""bitsandbytes' layouts: NF4 with double quantisation, and LLM.int8."""

from __future__ import annotations

import argparse
import json
import math
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

_BLOCK: Final = 64  # numbers that share a scale
_NESTED_BLOCK: Final = 256  # scales that share a scale
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
    needs_statistics: bool = False

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> FourBitMethod:
        config = ModelConfig.from_folder(args.model).raw
        return cls(str(config.get("dtype", config.get("torch_dtype", "float32"))))

    @property
    def scheme(self) -> FourBit:
        return FourBit("nf4", is_double=True)

    def check(self, where: str, in_features: int) -> None:
        if math.gcd(in_features, _BLOCK) % 8:
            raise StartupError(
                f"{where} has {in_features} columns; nf4 is written for multiples of 8, whose rows end where groups of "
                "columns do"
            )

    def quantise(self, matrices: Mapping[str, Tensor], _hessian: Tensor | None) -> dict[str, Tensor]:
        return {
            f"{name}.{leaf}": tensor
            for name, matrix in matrices.items()
            for leaf, tensor in self._stored(matrix).items()
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

    def _stored(self, matrix: Tensor) -> dict[str, Tensor]:
        """By leaf. Codes are the nearest for the scales that are stored, not for those before they were rounded."""
        numbers = table("nf4")
        blocks = _in_blocks(matrix.flatten(), _BLOCK)
        scales = blocks.abs().amax(1)
        offset, dynamic = scales.mean(), dynamic_map()
        nested = _in_blocks(scales - offset, _NESTED_BLOCK)
        largest = nested.abs().amax(1)
        nested_codes = nearest_codes(nested, largest, dynamic)
        stored = (dynamic[nested_codes.long()] * largest.unsqueeze(1)).flatten()[: len(scales)] + offset
        codes = nearest_codes(blocks, stored, numbers).flatten()[: matrix.numel()]
        state = {
            "quant_type": "nf4",
            "blocksize": _BLOCK,
            "dtype": self.dtype,
            "shape": list(matrix.shape),
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
        return {
            "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
            "weight.absmax": nested_codes.flatten()[: len(scales)],
            "weight.quant_map": numbers,
            "weight.nested_absmax": largest,
            "weight.nested_quant_map": dynamic,
            f"{STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
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


def _in_blocks(numbers: Tensor, size: int) -> Tensor:
    """[count] to [⌈count / size⌉, size], zeros after the last."""
    padded: Tensor = functional.pad(numbers, (0, -len(numbers) % size))
    return padded.view(-1, size)
