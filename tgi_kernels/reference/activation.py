"""Oracles of `tgi_kernels.activation`; float64 comes back."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_and_mul(x: Tensor) -> Tensor:
    """x: [tokens, 2·inner], gate first. Returns [tokens, inner]."""
    gate, up = x.double().chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_and_mul(x: Tensor) -> Tensor:
    """As `silu_and_mul`, with x·Φ(x)."""
    gate, up = x.double().chunk(2, dim=-1)
    return functional.gelu(gate) * up


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """As `silu_and_mul`, with gelu's tanh approximation."""
    gate, up = x.double().chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up
