"""Root-mean-square normalisation. Zhang and Sennrich 2019, arXiv:1910.07467."""

from __future__ import annotations

from torch import Tensor, nn

from tgi_kernels.fp8 import Fp8Rows, fits_rms_norm_e4m3, rms_norm_e4m3
from tgi_kernels.norm import rms_norm
from tgi_server.layers.linear import Linear
from tgi_server.layers.weights import Weights


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis.

    `order`: [size] int32, the order of columns that all readers want, which round nothing then; None: their own.
    """

    def __init__(self, weights: Weights, size: int, eps: float) -> None:
        super().__init__()
        self.weight = weights.parameter("weight", size)
        self.eps = eps
        self.order: Tensor | None = None

    def forward(self, x: Tensor, reader: Linear | None = None) -> Tensor | Fp8Rows:
        """x: [tokens, size]. Returns a new tensor of that shape, rounded as `reader`, the only one of it, wants it."""
        rounding = None if reader is None else reader.rounding
        if rounding is not None and self.order is None and fits_rms_norm_e4m3(x):
            return rms_norm_e4m3(x, self.weight, self.eps, rounding)
        return rms_norm(x, self.weight, self.eps, order=self.order)
