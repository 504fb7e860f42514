"""Checks of arguments: errors that name the argument, its numbers, and what would be right.

The ops check what guards memory, themselves and briefly. Where one refuses its arguments, the functions here say
why in full; they take longer than the smaller ops do, so a call that goes well does without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Raises ValueError unless `tensor` has `shape`; a word stands for a dimension of any size."""
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(sizes)}; it needs [{wanted}]")


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raises ValueError unless `tensor` has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; it needs {wanted}: convert it with .to({dtypes[0]})"
        )


def check_alike(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless both lie on one device and have one dtype; on CPUs that is float32."""
    if like.device.type == "cpu":
        check_dtype(like_name, like, torch.float32)
    if tensor.device != like.device or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} and {like_name} {like.dtype} on {like.device}; "
            "an op's tensors share dtype and device"
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} is not contiguous (shape {list(tensor.shape)}, strides {list(tensor.stride())}); "
            "call .contiguous() on it first"
        )


def check_order(order: Tensor, columns: int) -> None:
    """Raises ValueError unless `order` is contiguous int32 and, on CPUs, has indices of so many columns alone."""
    check_dtype("order", order, torch.int32)
    check_contiguous("order", order)
    if not order.is_cuda and not bool(((order >= 0) & (order < columns)).all()):
        low, high = int(order.min()), int(order.max())
        raise ValueError(f"order has numbers from {low} to {high}; x has the columns 0 to {columns - 1}")
