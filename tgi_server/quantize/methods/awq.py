"""AWQ's layout: columns with large inputs are scaled up before they are rounded. Lin et al. 2023, arXiv:2306.00978.

Codes are then found as GPTQ finds them, which the layout does not mind.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_server.errors import StartupError
from tgi_server.quantization.awq import Awq
from tgi_server.quantization.scheme import group_count
from tgi_server.quantize.grid import Grid
from tgi_server.quantize.solve import gptq, nearest

_POWERS: Final = tuple(0.1 * i for i in range(10))  # of the inputs' size, that columns are multiplied by

_ROWS: Final = 512  # at least, that the powers are tried on
_SMALLEST: Final = (
    1e-2  # of the mean size: inputs that hardly occur would make scales that float16 cannot hold
)


@dataclass(frozen=True)
class AwqMethod:
    """4 bits with zero points."""

    grid: Grid

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> AwqMethod:
        if args.bits != 4:
            raise StartupError(f"--bits is {args.bits}; awq has 4")
        return cls(Grid(4, args.group_size, is_symmetric=False, orders_columns=False))

    @property
    def scheme(self) -> Awq:
        return Awq(self.grid.group_size)

    @property
    def needs_statistics(self) -> bool:
        return True

    def check(self, where: str, in_features: int) -> None:
        group_count(where, in_features, self.grid.group_size)

    def column_scales(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The powers of the inputs' size with which plain rounding loses least of the products, [in] float32."""
        size = hessian.diagonal().sqrt()
        size = size.clamp(min=float(size.mean()) * _SMALLEST + torch.finfo(size.dtype).tiny)
        weight = weight[:: max(1, len(weight) // _ROWS)]
        best, least = torch.ones_like(size), torch.inf
        for power in _POWERS:
            scales = size**power
            scales = scales / (scales.max() * scales.min()).sqrt()
            error = nearest(weight * scales, self.grid).dense() / scales - weight
            lost = float(((error @ hessian) * error).sum())
            if lost < least:
                best, least = scales, lost
        return best

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        if hessian is None:
            raise ValueError("awq needs the inputs' products")
        codes = gptq(torch.cat(list(matrices.values())), hessian, self.grid)
        tensors: dict[str, Tensor] = {}
        for name, rows in zip(matrices, _rows(matrices), strict=True):
            leaves = self.scheme.pack(codes.codes[rows], codes.scales[rows], codes.zeros[rows])
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
        return tensors

    def section(self) -> dict[str, object]:
        return self.scheme.section()


def _rows(matrices: Mapping[str, Tensor]) -> list[slice]:
    """Where each lies among all."""
    ends = torch.tensor([len(matrix) for matrix in matrices.values()]).cumsum(0).tolist()
    return [slice(end - len(matrix), end) for end, matrix in zip(ends, matrices.values(), strict=True)]
