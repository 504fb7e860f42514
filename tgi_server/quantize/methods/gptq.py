"""GPTQ's layout: codes by the inputs' statistics, or the nearest ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tgi_server.errors import StartupError
from tgi_server.quantization.gptq import Gptq
from tgi_server.quantization.scheme import group_count
from tgi_server.quantize.grid import Grid
from tgi_server.quantize.solve import gptq, nearest

_BITS: Final = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqMethod:
    """Codes on one grid for every matrix."""

    grid: Grid
    needs_statistics: bool

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> GptqMethod:
        if args.bits not in _BITS:
            raise StartupError(f"--bits is {args.bits}; gptq has {', '.join(map(str, _BITS))}")
        grid = Grid(args.bits, args.group_size, not args.asymmetric, args.desc_act is True)
        return cls(grid, needs_statistics=args.method == "gptq")

    @property
    def scheme(self) -> Gptq:
        """Zero points of the second version: of the first gptqmodel loads its own alone."""
        grid = self.grid
        shift = 1 if grid.is_symmetric else 0
        return Gptq(grid.bits, grid.group_size, grid.is_symmetric, grid.orders_columns, zero_shift=shift)

    def check(self, where: str, in_features: int) -> None:
        group_count(where, in_features, self.grid.group_size)

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        weight = torch.cat(list(matrices.values()))
        codes = nearest(weight, self.grid) if hessian is None else gptq(weight, hessian, self.grid)
        tensors: dict[str, Tensor] = {}
        first = 0
        for name, matrix in matrices.items():
            rows = slice(first, first + len(matrix))
            leaves = self.scheme.pack(
                codes.codes[rows], codes.scales[rows], codes.zeros[rows], codes.group_of
            )
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
            first += len(matrix)
        return tensors

    def section(self) -> dict[str, object]:
        return self.scheme.section()
