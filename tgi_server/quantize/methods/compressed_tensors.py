"""compressed-tensors' layouts of 8 bits, by plain rounding: float8 ("fp8") and whole numbers ("w8a16")."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgi_server.quantization.byte_codes import nearest_e4m3, nearest_int8
from tgi_server.quantization.compressed_tensors import CompressedTensors
from tgi_server.quantization.scheme import group_count, pack_stream


@dataclass(frozen=True)
class Fp8Method:
    """A scale a row; other engines round activations as well, to a scale a token."""

    needs_statistics = False

    @classmethod
    def from_arguments(cls, _args: argparse.Namespace) -> Fp8Method:
        return cls()

    @property
    def scheme(self) -> CompressedTensors:
        return CompressedTensors.from_section(self.section(), "--method fp8")

    def check(self, where: str, in_features: int) -> None:
        """Any number of columns will do."""

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        del hessian
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            found = nearest_e4m3(matrix)
            tensors[f"{name}.weight"] = found.codes.view(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = found.scales.bfloat16()
        return tensors

    def section(self) -> dict[str, object]:
        float8 = {"num_bits": 8, "type": "float", "symmetric": True}
        inputs = float8 | {"strategy": "token", "dynamic": True}
        return _section("float-quantized", float8 | {"strategy": "channel", "dynamic": False}, inputs)


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
