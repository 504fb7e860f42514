"""Columns of activations in another order."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_order, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("gather_columns")


def gather_columns(x: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """out[:, i] = x[:, order[i]].

    x: [tokens, columns], rows contiguous; on GPUs float32, bfloat16 or float16. order: [outs] int32, any indices of
    columns. out: [tokens, outs], not x; allocated when not given. Returns out. An index out of range raises
    ValueError on CPUs and gives NaN on GPUs, which cannot raise.
    """
    if out is None:
        out = torch.empty((x.shape[0], order.shape[0]), dtype=x.dtype, device=x.device)
    try:
        if x.is_cuda:
            ops.gather_columns(x, order, out)
        else:
            torch.index_select(x, 1, order, out=out)
    except (IndexError, RuntimeError):
        check_shape("x", x, ("tokens", "columns"))
        check_shape("order", order, ("outs",))
        check_order(order, x.shape[1])
        check_shape("out", out, (x.shape[0], order.shape[0]))
        if x.is_cuda:
            check_alike("out", out, "x", x)
        raise
    return out
