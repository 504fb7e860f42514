"""Products of 16-bit matrices on Hopper GPUs, the next op fused in: one kernel for few tokens, one for many.

Both walk in_features in ascending order with one sum for each output, so a token's bits depend neither on the
number of tokens nor on the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_dtype, check_shape
from tgi_kernels._library import ops
from tgi_kernels.activation import Gate

GATES: dict[str, int] = {"silu": 1, "gelu": 2, "gelu_tanh": 3}  # csrc/matmul/ops_cuda.cpp knows the numbers
SKINNY_TOKENS = 16  # up to which the skinny kernel is the faster one


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these tensors.

    The copy engine's terms: x and weight start on 16 bytes, and so does each of their rows.
    """
    return (
        x.is_cuda
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
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias; then residual + y, or act(first half of y) · second half. For few tokens.

    x: [tokens, in_features]; weight: [out_features, in_features]; bias: [out_features]; residual: like y, may
    be out. All of one dtype, bfloat16 or float16, on one Hopper GPU, laid out as `takes` says.
    out: [tokens, out_features], half as wide with a gate; allocated when not given. Returns out.
    Each step is rounded as the separate ops round it. Raises ValueError for shapes and dtypes that do not fit.
    """
    return _matmul(ops.matmul_skinny, x, weight, bias, residual, gate, out)


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What `skinny_matmul` computes, bit for bit, for many tokens."""
    return _matmul(ops.matmul_gemm, x, weight, bias, residual, gate, out)


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The faster of `skinny_matmul` and `gemm` for this number of tokens."""
    op = ops.matmul_skinny if x.shape[0] <= SKINNY_TOKENS else ops.matmul_gemm
    return _matmul(op, x, weight, bias, residual, gate, out)


def _matmul(
    op: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Gate | None,
    out: Tensor | None,
) -> Tensor:
    check_shape("x", x, ("tokens", "in_features"))
    check_shape("weight", weight, ("out_features", x.shape[1]))
    check_dtype("x", x, torch.bfloat16, torch.float16)
    check_alike("weight", weight, "x", x)
    if gate is not None and residual is not None:
        raise ValueError(f"both a gate ({gate}) and a residual are given; a product takes one of the two")
    features = weight.shape[0] if gate is None else weight.shape[0] // 2
    if out is None:
        out = torch.empty((x.shape[0], features), dtype=x.dtype, device=x.device)
    op(x, weight, bias, residual, 0 if gate is None else GATES[gate], out)
    return out


def _copies_in_boxes(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
