"""Inputs for kernel tests, and what counts as equal."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the largest expected value: a few roundings of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def activation_dtypes(device: str) -> list[torch.dtype]:
    """What activations are made of on a device."""
    return [torch.float32] if device == "cpu" else [torch.float16, torch.bfloat16]


def normal(
    noise: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=noise).to(device=device, dtype=dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """A buffer full of NaN: what an op leaves unwritten, or should not have read, shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_near(got: Tensor, want: Tensor, times: float = 1.0) -> None:
    """Fails unless got lies within its dtype's tolerance of the float64 oracle; a NaN is never near."""
    if want.numel() == 0:
        assert got.shape == want.shape
        return
    error = (got.double() - want).abs().max().item()
    bound = times * TOLERANCE[got.dtype] * max(1.0, want.abs().max().item())
    assert error <= bound, f"the largest error is {error:.3g}; allowed is {bound:.3g}"


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Fails unless both hold the same bits."""
    assert got.shape == want.shape and got.dtype == want.dtype
    as_ints = torch.int32 if got.dtype == torch.float32 else torch.int16
    differing = (got.contiguous().view(as_ints) != want.contiguous().view(as_ints)).sum().item()
    assert differing == 0, f"{differing} of {got.numel()} elements differ"
