"""compressed-tensors' layouts of 8 bits: float8 ("fp8") by the inputs' statistics, whole numbers by plain rounding."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import table
from tgi_server.quantization.byte_codes import nearest_e4m3, nearest_int8
from tgi_server.quantization.compressed_tensors import CompressedTensors
from tgi_server.quantization.scheme import group_count, pack_stream
from tgi_server.quantize.solve import Solution
from tgi_server.quantize.table_grid import TableGrid

_EACH_TOKEN: Final = {"strategy": "token", "dynamic": True}  # how activations are scaled


@dataclass(frozen=True)
class Fp8Method:
    """A scale a row. Other engines round activations as well, to a scale a token."""

    needs_statistics: bool = True  # else plain rounding

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Fp8Method:
        return cls(needs_statistics=args.samples > 0)

    @property
    def scheme(self) -> CompressedTensors:
        return CompressedTensors.from_section(self.section(), "--method fp8")

    def check(self, where: str, in_features: int) -> None:
        """Any number of columns will do."""

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        weight = torch.cat(list(matrices.values()))
        codes, scales = _rounded(weight) if hessian is None else _solved(weight, hessian)
        rows = [len(matrix) for matrix in matrices.values()]
        tensors: dict[str, Tensor] = {}
        for name, own, its in zip(matrices, codes.split(rows), scales.split(rows), strict=True):
            tensors |= {f"{name}.weight": own, f"{name}.weight_scale": its}
        return tensors

    def section(self) -> dict[str, object]:
        float8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = float8 | {"strategy": "channel", "dynamic": False}
        return _section("float-quantized", weights, float8 | _EACH_TOKEN)


@dataclass(frozen=True)
class W8A8Method:
    """Whole numbers with a scale a row; other engines round activations as well, to a scale a token."""

    needs_statistics = False

    @classmethod
    def from_arguments(cls, _args: argparse.Namespace) -> W8A8Method:
        return cls()

    @property
    def scheme(self) -> CompressedTensors:
        return CompressedTensors.from_section(self.section(), "--method w8a8")

    def check(self, where: str, in_features: int) -> None:
        """Any number of columns will do."""

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        del hessian
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            found = nearest_int8(matrix, matrix.shape[1])
            tensors[f"{name}.weight"] = (found.codes ^ 128).view(torch.int8)  # less 128, in two's complement
            tensors[f"{name}.weight_scale"] = found.scales
        return tensors

    def section(self) -> dict[str, object]:
        int8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
        weights = int8 | {"strategy": "channel", "dynamic": False}
        return _section("int-quantized", weights, int8 | _EACH_TOKEN)


@dataclass(frozen=True)
class W8A16Method:
    """A scale a row and group of columns; -1: a row."""

    group_size: int
    needs_statistics = False

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> W8A16Method:
        return cls(args.group_size)

    @property
    def scheme(self) -> CompressedTensors:
        return CompressedTensors.from_section(self.section(), "--method w8a16")

    def check(self, where: str, in_features: int) -> None:
        group_count(where, in_features, self.group_size)

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        del hessian
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            found = nearest_int8(matrix, matrix.shape[1] if self.group_size == -1 else self.group_size)
            tensors[f"{name}.weight_packed"] = pack_stream(found.codes, 8)
            tensors[f"{name}.weight_scale"] = found.scales
            tensors[f"{name}.weight_shape"] = torch.tensor(matrix.shape)
        return tensors

    def section(self) -> dict[str, object]:
        strategy: dict[str, Any] = {"strategy": "channel"}
        if self.group_size != -1:
            strategy = {"strategy": "group", "group_size": self.group_size}
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | strategy
        return _section("pack-quantized", weights, None)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes [out, in] and scales [out, 1], the nearest."""
    found = nearest_e4m3(weight)
    return found.codes.view(torch.float8_e4m3fn), found.scales.bfloat16()


def _solved(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The same, by which products with inputs are nearly those of the weight."""
    numbers = table("e4m3")
    grid = TableGrid(numbers[numbers.isfinite()].unique(), -1, torch.bfloat16)
    solution = Solution(weight, hessian, hessian.diagonal().argsort(descending=True), grid)
    solution.improve()
    return solution.codes.to(torch.float8_e4m3fn), solution.scales.bfloat16()


def _section(layout: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, object]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
