"""EXL2: as many bits for each run of columns as pay, fractions of a bit on average."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tgi_server.errors import StartupError
from tgi_server.quantization.exl2 import BITS, BLOCK, Exl2
from tgi_server.quantization.scheme import pack_stream
from tgi_server.quantize.allocate import Offer, allocate
from tgi_server.quantize.mixed import Mixed, solve
from tgi_server.quantize.offer import offer_of
from tgi_server.quantize.survey import Seen

# Of a group: its width, its first word, the largest of its scales; of a row in it: its scale; of a column: its place.
_GROUP_BITS, _SCALE_BITS, _COLUMN_BITS = 48, 4, 32


@dataclass
class Exl2Method:
    """bits: of a weight of the blocks, all that is stored for it counted. plan: widths and order of each matrix."""

    bits: float
    plan: Mapping[str, Tensor] = field(default_factory=dict)
    needs_statistics: bool = True

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Exl2Method:
        if not BITS[0] < args.bits <= BITS[-1]:
            raise StartupError(f"--bits is {args.bits}; exl2 has more than {BITS[0]}, up to {BITS[-1]}")
        return cls(float(args.bits))

    @property
    def scheme(self) -> Exl2:
        return Exl2(self.bits)

    def check(self, where: str, in_features: int) -> None:
        if in_features % BLOCK:
            raise StartupError(f"{where} has {in_features} columns; exl2 packs blocks of {BLOCK}")

    def measure(self, survey: Iterable[Seen]) -> dict[str, Tensor]:
        """What `plan` is to be: for each matrix the widths of its groups, widest first, and the order of columns.

        Raises StartupError if even the narrowest codes are too many bits.
        """
        offers: dict[str, Offer] = {}
        orders: dict[str, Tensor] = {}
        beside = weights = 0.0
        for seen in survey:
            orders[seen.name] = order = seen.hessian.diagonal().argsort(descending=True)
            offers[seen.name] = offer_of(seen, order, BITS, BLOCK)
            out, columns = seen.weight.shape
            beside += columns * _COLUMN_BITS + columns // BLOCK * (_GROUP_BITS + out * _SCALE_BITS)
            weights += out * columns
        left = self.bits - beside / weights
        if left < BITS[0]:
            raise StartupError(
                f"--bits is {self.bits}; scales and orders of this model take {beside / weights:.2f} of them, and "
                f"codes {BITS[0]} at least: give {BITS[0] + beside / weights:.2f} or more"
            )
        plan = {}
        for name, widths in allocate(offers, BITS, left).items():
            sorted_widths, blocks = torch.tensor(widths).sort(descending=True, stable=True)
            plan[f"{name}.widths"] = sorted_widths.to(torch.uint8)
            plan[f"{name}.order"] = orders[name].view(-1, BLOCK)[blocks].flatten()
        return plan

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        assert hessian is not None
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            widths = tuple(self.plan[f"{name}.widths"].tolist())
            found = solve(matrix, hessian, widths, (BLOCK,) * len(widths), self.plan[f"{name}.order"])
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in packed(found).items()}
        return tensors

    def section(self) -> dict[str, object]:
        return {"quant_method": "exl2", "bits": self.bits, "head_bits": 16}


def packed(matrix: Mixed) -> dict[str, Tensor]:
    """A matrix as it is stored, by leaf; rows are filled up to a multiple of 32."""
    missing = -len(matrix.codes) % BLOCK
    words, groups, row = [], [], 0
    for codes, bits in zip(matrix.codes.split(list(matrix.sizes), 1), matrix.bits, strict=True):
        filled = functional.pad(codes, (0, 0, 0, missing), value=1 << (bits - 1))
        words.append(pack_stream(filled, bits).T)
        groups += [bits, row]
        row += len(words[-1])
    fine = functional.pad(matrix.fine - 1, (0, 0, 0, missing))
    return {
        "q_weight": torch.cat(words).contiguous(),
        "q_groups": torch.tensor(groups, dtype=torch.int16),
        "q_scale": pack_stream(fine.T.contiguous(), 4),
        "q_scale_max": matrix.largest,
        "q_invperm": matrix.order.argsort().int(),
    }
