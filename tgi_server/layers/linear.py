"""Matrix products: several of a checkpoint's matrices, stacked, behind one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tgi_kernels.activation import Gate
from tgi_kernels.fp8 import Fp8Rows, PackedFp8
from tgi_server.layers.product import Fp8, load_product
from tgi_server.layers.weights import Weights


class Linear(nn.Module):
    """x · Wᵀ + b, where W stacks the matrices `names` and b their biases, as far as the checkpoint has them.

    `outs` are the matrices' numbers of rows. Columns of the result follow the order of `names`, and within those of
    one matrix the order `rows`, [rows of each matrix] int32 or int64; None: their own.
    """

    def __init__(
        self,
        weights: Weights,
        names: Sequence[str],
        in_features: int,
        outs: Sequence[int],
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(weights.name(name) for name in names)
        self.in_features, self.outs = in_features, tuple(outs)
        self.product = load_product(weights, names, in_features, outs, rows)
        self.bias: Tensor | None = None
        if any(weights.has(f"{name}.bias") for name in names):
            biases = [_bias(weights, name, out) for name, out in zip(names, outs, strict=True)]
            self.bias = torch.cat(biases if rows is None else [bias[rows] for bias in biases])

    @property
    def rounding(self) -> PackedFp8 | None:
        """What x may be rounded for before, if it is rounded at all."""
        return self.product.packed if isinstance(self.product, Fp8) else None

    def forward(self, x: Tensor | Fp8Rows, *, gate: Gate | None = None, out: Tensor | None = None) -> Tensor:
        """x: [tokens, in_features], rounded for `rounding` or not. Returns [tokens, sum(outs)]: `out`, if given.

        With a gate: act(first half of the columns) · second half, and half as many columns.
        """
        if isinstance(x, Tensor):
            return self.product(x, self.bias, gate=gate, out=out)
        assert isinstance(self.product, Fp8)
        return self.product(x, self.bias, gate=gate, out=out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add the product to `residual`, [tokens, sum(outs)], in place."""
        self.product(x, self.bias, residual=residual, out=residual)


def _bias(weights: Weights, name: str, out: int) -> Tensor:
    if weights.has(f"{name}.bias"):
        return weights.parameter(f"{name}.bias", out)
    return torch.zeros(out, device=weights.device, dtype=weights.dtype)
