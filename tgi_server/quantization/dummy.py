"""Made-up matrices of a few bits, for measuring speed and memory of a quantised model without its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_kernels.quant_size import QuantKind
from tgi_kernels.quant_weight import QuantWeight, table
from tgi_server.quantization.contents import fitted
from tgi_server.quantization.scheme import Tensors, group_count

_WIDEST = 3.0  # standard deviations of a made-up matrix that codes reach


@dataclass(frozen=True)
class DummyScheme:
    """Matrices of one kind: what a source makes up for a dense one, rounded to the nearest codes."""

    kind: QuantKind
    title: str
    leaf: str = ""

    def covers(self, _tensors: Tensors, name: str) -> bool:
        """All but embedding and head, as nearly every quantised checkpoint has it."""
        return name.endswith("_proj")

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        dense = tensors.read(f"{name}.weight", (out_features, in_features)).float()
        kind = fitted(self.kind, in_features)
        bits = int(kind.bits)
        count, size = group_count(f"{tensors.folder}: {name}", in_features, kind.group_size)
        groups = (out_features, count)
        middle = 1 << (bits - 1)
        numbers = torch.arange(1 << bits) - middle if kind.values == "integer" else table(kind.values)
        numbers = numbers.to(dense.device, torch.float32)
        scale = _WIDEST * float(dense.std()) / float(numbers.nan_to_num(0.0).abs().max())
        scale_type = torch.float32 if kind.scale_bytes == 4 else torch.float16
        zeros = torch.full(groups, middle, dtype=torch.int16, device=dense.device)
        if kind.zeros == "many":
            zeros[::2] -= 1
        return QuantWeight(
            _nearest(dense / scale, numbers),
            torch.full(groups, scale, dtype=scale_type, device=dense.device),
            zeros if kind.zeros != "none" else None,
            size,
            bits,
            torch.arange(in_features, device=dense.device).flip(0) if kind.is_ordered else None,
            kind.values,
            torch.zeros(groups, device=dense.device) if kind.offset_bytes else None,
        )


def _nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """The code of the number nearest to each value. values: any shape; numbers: one for each code, NaN for none."""
    ascending, codes = numbers.nan_to_num(float("inf")).sort()
    borders = (ascending[1:] + ascending[:-1]) / 2
    nearest: Tensor = codes.to(torch.uint8)[torch.bucketize(values, borders)]
    return nearest
