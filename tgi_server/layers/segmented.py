"""The product of a matrix whose columns lie in runs of different widths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tgi_kernels.columns import gather_columns
from tgi_kernels.matmul import GATED
from tgi_kernels.quant import fits_kernels, pack_quant, quant_linear
from tgi_kernels.quant_segments import Segments
from tgi_server.layers.ending import Ending
from tgi_server.layers.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Segmented:
    """Runs of columns, whose products are added up one after another: the bits depend on no other row of x."""

    def __init__(self, weights: Weights, matrix: Segments) -> None:
        self.kind = f"{weights.scheme.title if weights.scheme else 'segments'} · fused"
        self.parts = [pack_quant(part, weights.dtype) for part in matrix.parts]
        self.widths = matrix.widths
        self.order = None if matrix.order is None else matrix.order.int()

    @staticmethod
    def takes(matrix: Segments) -> bool:
        """Whether kernels multiply every run. On GPUs each sum would be rounded to 16 bits: theirs take all runs."""
        return all(not part.codes.is_cuda and fits_kernels(part) for part in matrix.parts)

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        gate, out = ending.get("gate"), ending.get("out")
        if gate is not None:
            return GATED[gate](self(x, bias), out)
        if self.order is not None:
            x = gather_columns(x, self.order)
        first, *others = zip(self.parts, x.split_with_sizes(self.widths, 1), strict=True)
        y = quant_linear(first[1], first[0], bias, residual=ending.get("residual"), out=out)
        for part, columns in others:
            quant_linear(columns, part, residual=y, out=y)
        return y

    def take_order(self) -> Tensor | None:
        """That of the runs' columns, one run after another; from now on those of x have to be in it."""
        order, self.order = self.order, None
        return order
