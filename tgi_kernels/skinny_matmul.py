"""Products of few tokens with a large weight on Hopper GPUs: each weight read once, the next op fused in."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_dtype, check_shape
from tgi_kernels._library import ops

GATES: dict[str, int] = {"silu": 1, "gelu": 2, "gelu_tanh": 3}  # csrc/matmul/ops_cuda.cpp knows the numbers
MAX_TOKENS = 64  # beyond it cuBLAS is as fast and, from 256 tokens on, gives the same bits


def is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether `skinny_matmul` takes these tensors and is the faster choice for them."""
    return (
        x.is_cuda
        and x.shape[0] <= MAX_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16)
        and _copies_in_boxes(x)
        and _copies_in_boxes(weight)
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )


def skinny_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Literal["silu", "gelu", "gelu_tanh"] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias; then residual + y, or act(first half of y) · second half.

    x: [tokens, in_features]; weight: [out_features, in_features]; bias: [out_features]; residual: like y, may
    be out. All of one dtype, bfloat16 or float16, on one Hopper GPU; x and weight start on 16 bytes and their
    rows lie a multiple of 16 bytes apart. out: [tokens, out_features], half as wide with a gate; allocated
    when not given. Returns out.
    Each step is rounded as the separate ops round it, and every output is one sum over in_features in
    ascending order: a token's bits do not depend on the number of tokens.
    """
    check_shape("x", x, ("tokens", "in_features"))
    check_shape("weight", weight, ("out_features", x.shape[1]))
    check_dtype("x", x, torch.bfloat16, torch.float16)
    check_alike("weight", weight, "x", x)
    if gate is not None and residual is not None:
        raise ValueError(f"both a gate ({gate}) and a residual are given; a product takes one of the two")
    features = weight.shape[0] if gate is None else weight.shape[0] // 2
    if out is None:
        out = torch.empty((x.shape[0], features), dtype=x.dtype, device=x.device)
    ops.matmul_skinny(x, weight, bias, residual, 0 if gate is None else GATES[gate], out)
    return out


def _copies_in_boxes(matrix: Tensor) -> bool:
    """The bulk copy engine's terms: 16-byte aligned, rows a multiple of 16 bytes apart."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
