"""Oracle of `tgi_kernels.fp8`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 448.0
BLOCK = 128
LEAST = 2.0**-100  # that a scale is made for


def quantise_e4m3(
    x: Tensor, *, in_blocks: bool = False, fixed: float | None = None, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The codes and scales of `tgi_kernels.fp8.quantise_e4m3`, in the same float32 steps. x: [tokens, columns].

    Scales of blocks are not filled up.
    """
    x = x.float()
    columns = x.shape[1]
    size = BLOCK if in_blocks else columns
    groups = torch.nn.functional.pad(x, (0, -columns % size)).unflatten(1, (-1, size))
    if fixed is None:
        most = groups.abs().amax(2).clamp(max=bound).clamp(min=LEAST)
        scales = most * torch.tensor(1 / LARGEST, dtype=torch.float32)
    else:
        scales = torch.full(groups.shape[:2], fixed, dtype=torch.float32, device=x.device)
    scaled = (groups * (1 / scales).unsqueeze(2)).flatten(1)[:, :columns]
    codes = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scales if in_blocks else scales.squeeze(1)


def widen_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [rows, columns] with scales [rows] as float64."""
    return codes.view(torch.float8_e4m3fn).double() * scales.double().unsqueeze(1)


def widen_blocks(codes: Tensor, scales: Tensor, rows: int = BLOCK) -> Tensor:
    """codes [rows, columns] with scales [⌈rows / `rows`⌉, ⌈columns / 128⌉] as float64."""
    wide = scales.double().repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)
    return codes.view(torch.float8_e4m3fn).double() * wide[: codes.shape[0], : codes.shape[1]]
