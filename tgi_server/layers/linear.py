"""Matrix products: several of a checkpoint's matrices, stacked, behind one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tgi_kernels.activation import Gate
from tgi_kernels.matmul import linear, pack_linear
from tgi_server.layers.weights import Weights


class Linear(nn.Module):
    """x · Wᵀ + b, where W stacks the matrices `names` and b their biases, as far as the checkpoint has them.

    `outs` are the matrices' numbers of rows. Columns of the result follow the order of `names`.
    """

    def __init__(self, weights: Weights, names: Sequence[str], in_features: int, outs: Sequence[int]) -> None:
        super().__init__()
        parts = [
            weights.stored(f"{name}.weight", out, in_features) for name, out in zip(names, outs, strict=True)
        ]
        if weights.device.type != "cpu":
            matrix = weights.on_device(*parts)
        else:
            matrix = torch.cat(parts) if len(parts) > 1 else parts[0]
        if weights.device.type == "cpu" and matrix.dtype != torch.bfloat16:
            # CPU kernels widen bf16 as they read it, exactly; fp16 they do not know.
            matrix = matrix.float()
        self.packed = pack_linear(matrix)
        self.bias: Tensor | None = None
        if any(weights.has(f"{name}.bias") for name in names):
            self.bias = torch.cat([_bias(weights, name, out) for name, out in zip(names, outs, strict=True)])

    def forward(self, x: Tensor, *, gate: Gate | None = None, out: Tensor | None = None) -> Tensor:
        """x: [tokens, in_features]. Returns [tokens, sum(outs)] in x's type: `out`, if given.

        With a gate: act(first half of the columns) · second half, and half as many columns.
        """
        return linear(x, self.packed, self.bias, gate=gate, out=out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add the product to `residual`, [tokens, sum(outs)], in place."""
        linear(x, self.packed, self.bias, residual=residual, out=residual)


def _bias(weights: Weights, name: str, out: int) -> Tensor:
    if weights.has(f"{name}.bias"):
        return weights.parameter(f"{name}.bias", out)
    return torch.zeros(out, device=weights.device, dtype=weights.dtype)
