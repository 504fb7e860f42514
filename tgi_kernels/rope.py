"""Rotary position embedding fused with the write of keys and values into their pages.

Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("rotary_kv_write")

PAGE_TOKENS = 16


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Rotates q in place; writes the rotated k, and v, to their slots of the KV cache. k stays as it is.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim]. All three may be views of one buffer: a
    token's heads are contiguous, tokens may lie apart. kv_pages: [pages, 2, kv_heads, 16, head_dim], of
    q's type or, beside 16-bit q on GPUs, float8_e4m3fn: rounded to nearest, ±448 where it would be more.
    cos_sin: [positions, rot_dim] float32, rot_dim / 2 cosines and then as many sines; dimensions past rot_dim
    are not rotated. positions: [tokens] int32, rows of cos_sin. slots: [tokens] int64, page · 16 + row, or
    -1: nothing is written.
    interleaved: pairs are (2i, 2i+1) instead of (i, i + rot_dim / 2). q_norm, k_norm: [head_dim], an RMS norm
    with `eps` of every head before the rotation.
    Raises ValueError for arguments that do not fit each other; on CPUs RuntimeError for a position or slot
    out of range.
    """
    try:
        ops.rotary_kv_write(q, k, v, kv_pages, cos_sin, positions, slots, interleaved, q_norm, k_norm, eps)
    except RuntimeError:
        _check(q, k, v, kv_pages, cos_sin, positions, slots, q_norm, k_norm)
        raise


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    tokens, _, head_dim = _check_heads(q, k, v)
    check_shape("kv_pages", kv_pages, ("pages", 2, k.shape[1], PAGE_TOKENS, head_dim))
    if kv_pages.device != q.device:
        raise ValueError(f"kv_pages is on {kv_pages.device} and q on {q.device}; they share a device")
    check_contiguous("kv_pages", kv_pages)
    check_shape("cos_sin", cos_sin, ("positions", "rot_dim"))
    check_dtype("cos_sin", cos_sin, torch.float32)
    if cos_sin.shape[1] > head_dim or cos_sin.shape[1] % 2:
        raise ValueError(
            f"cos_sin has {cos_sin.shape[1]} columns; rot_dim is even and at most head_dim {head_dim}"
        )
    check_shape("positions", positions, (tokens,))
    check_dtype("positions", positions, torch.int32)
    check_shape("slots", slots, (tokens,))
    check_dtype("slots", slots, torch.int64)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_shape(name, norm, (head_dim,))
            check_alike(name, norm, "q", q)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int]:
    check_shape("q", q, ("tokens", "heads", "head_dim"))
    tokens, heads, head_dim = q.shape
    check_shape("k", k, (tokens, "kv_heads", head_dim))
    check_shape("v", v, k.shape)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_alike(name, x, "q", q)
        if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != head_dim):
            raise ValueError(
                f"{name} has strides {list(x.stride())}; "
                f"the heads of a token lie contiguous: [any, {head_dim}, 1]"
            )
    return tokens, heads, head_dim
