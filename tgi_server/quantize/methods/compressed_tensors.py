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
_STEPS: Final = torch.arange(-127.0, 128.0)
_FLOATS: Final = table("e4m3")[table("e4m3").isfinite()].unique()
_POWERS: Final = tuple(0.1 * i for i in range(1, 11))
_SMALLEST: Final = 1e-2  # of the mean size
_TOKEN_PEAK: Final = 3.0  # square of a token's largest number over the largest mean square


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
        if hessian is None:
            codes, scales = _nearest_floats(weight)
        else:
            numbers, scales = _solved(weight, hessian, _FLOATS)
            codes = numbers.to(torch.float8_e4m3fn)
        return _split(matrices, codes, scales)

    def section(self) -> dict[str, object]:
        float8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = float8 | {"strategy": "channel", "dynamic": False}
        return _section("float-quantized", weights, float8 | _EACH_TOKEN)


@dataclass(frozen=True)
class W8A8Method:
    """Whole numbers with a scale a row, multiplied by activations in whole numbers with a scale a token.

    Columns are scaled so that rounding both loses little, from Xiao et al. 2022, arXiv:2211.10438: a few inputs that
    are much larger than others would leave these few steps.
    """

    needs_statistics: bool = True  # else columns stay as they are

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> W8A8Method:
        return cls(needs_statistics=args.samples > 0)

    @property
    def scheme(self) -> CompressedTensors:
        return CompressedTensors.from_section(self.section(), "--method w8a8")

    def check(self, where: str, in_features: int) -> None:
        """Any number of columns will do."""

    def column_scales(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Of products of powers of the inputs' size and the weights', the one that loses least, [in] float32."""
        size = _without_zeros(hessian.diagonal().sqrt())
        largest = _without_zeros(weight.abs().amax(0))
        candidates = [size**power / largest ** (1 - power) for power in _POWERS]
        candidates += [size**power for power in _POWERS] + [torch.ones_like(size)]
        scales = min(candidates, key=lambda scales: _lost(weight, size, scales))
        return scales / (scales.max() * scales.min()).sqrt()

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        weight = torch.cat(list(matrices.values()))
        codes, scales = _nearest_steps(weight) if hessian is None else _solved(weight, hessian, _STEPS)
        return _split(matrices, codes.to(torch.int8), scales)

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


def _nearest_floats(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8 codes [out, in] and scales [out, 1], the nearest."""
    found = nearest_e4m3(weight)
    return found.codes.view(torch.float8_e4m3fn), found.scales.bfloat16()


def _nearest_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [out, in] and scales [out, 1], the nearest."""
    found = nearest_int8(weight, weight.shape[1])
    return found.codes.short() - 128, found.scales


def _solved(weight: Tensor, hessian: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Some of `numbers` [out, in] and scales [out, 1], whose products with inputs are nearly those of the weight."""
    grid = TableGrid(numbers, -1, torch.bfloat16)
    solution = Solution(weight, hessian, hessian.diagonal().argsort(descending=True), grid)
    solution.improve()
    return solution.codes, solution.scales.bfloat16()


def _split(matrices: Mapping[str, Tensor], codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Stored tensors of matrices whose rows lie together."""
    rows = [len(matrix) for matrix in matrices.values()]
    tensors: dict[str, Tensor] = {}
    for name, own, its in zip(matrices, codes.split(rows), scales.split(rows), strict=True):
        tensors |= {f"{name}.weight": own, f"{name}.weight_scale": its}
    return tensors


def _without_zeros(size: Tensor) -> Tensor:
    """What hardly occurs would make scales that 16 bits cannot hold."""
    return size.clamp(min=float(size.mean()) * _SMALLEST + torch.finfo(size.dtype).tiny)


def _lost(weight: Tensor, size: Tensor, scales: Tensor) -> float:
    """The expected square error of the products, up to a factor, when columns are multiplied by `scales`.

    Rounding errs by the same variance everywhere in a row of weights, or in a token, which follows the square of its
    largest number. What that is of tokens is not known, only the mean square of each input: the largest of these times
    a factor that was found by trying. SmolLM2-135M loses 0.4 % with 3, and 0.6 % with 2·ln(inputs), which would be that
    of a normal distribution.
    """
    weight, size = weight * scales, size / scales
    of_weights = weight.abs().amax(1).square().sum() * size.square().sum()
    of_inputs = _TOKEN_PEAK * size.max().square() * weight.square().sum()
    return float(of_weights + of_inputs)


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
