"""Causal attention over paged keys and values: prefill, decode, and batches of both.

Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("attention")

PAGE_TOKENS = 16


def attention(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    bias_by_distance: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q · k · scale) · v for every query against the keys of its sequence up to its own position.

    q: [tokens, heads, head_dim], the queries of all sequences one after the other; tokens may lie apart.
    kv_pages: [pages, 2, kv_heads, 16, head_dim], keys at [:, 0] and values at [:, 1]; heads is a multiple of
    kv_heads.
    page_table: [seqs, max_pages] int32: token t is in row t % 16 of page page_table[seq, t // 16].
    query_starts: [seqs + 1] int32, where each sequence's queries begin in q; the last is tokens.
    kv_lens: [seqs] int32, keys with this step's: query i of n has position kv_len - n + i.
    window: a query sees itself and the window - 1 keys before it; 0: all. softcap: scores become softcap ·
    tanh(score / softcap); 0: they stay. alibi_slopes: [heads] float32, times key position - query position,
    added to the scores.
    sinks: [heads] float32, one more score in the softmax that has no value.
    bias: [tokens or 1, heads or 1, columns] float32, contiguous columns, added to the scores after cap and
    slopes: bias[i, h, k] to that of query i, head h and the key of position k or, bias_by_distance, the key k
    before the query (T5's buckets, one row for all tokens). Columns beyond the last are the last; 1 stands for
    all. Numbers are finite or -inf; a query all of whose keys have -inf becomes zero.
    out: like q, contiguous; allocated when not given. Returns out.
    A token's result depends on its own sequence alone, not on its neighbours nor on how its prompt was cut.
    Raises ValueError for arguments that do not fit each other; on CPUs RuntimeError for bad lengths or pages.
    """
    if window < 0 or softcap < 0:
        raise ValueError(f"window is {window} and softcap {softcap}; both are positive, or 0 for none")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    try:
        ops.attention(
            q, kv_pages, page_table, query_starts, kv_lens, scale, window, softcap, alibi_slopes, sinks, out,
            bias, bias_by_distance,
        )  # fmt: skip
    except RuntimeError:
        _check(q, kv_pages, page_table, query_starts, kv_lens, alibi_slopes, sinks, out)
        _check_bias(bias, bias_by_distance, q)
        raise
    return out


def _check_bias(bias: Tensor | None, by_distance: bool, q: Tensor) -> None:
    """Raises ValueError where a bias does not fit q, [tokens, heads, head_dim]."""
    if bias is None:
        if by_distance:
            raise ValueError(
                "bias_by_distance without a bias; it needs one, [tokens or 1, heads or 1, columns]"
            )
        return
    check_shape("bias", bias, ("tokens or 1", "heads or 1", "columns"))
    for dim, name in enumerate(("tokens", "heads")):
        if bias.shape[dim] not in (1, q.shape[dim]):
            raise ValueError(f"bias has {bias.shape[dim]} {name}; it needs {q.shape[dim]}, or 1 for all")
    check_dtype("bias", bias, torch.float32)
    if bias.shape[2] == 0 or (bias.shape[2] > 1 and bias.stride(2) != 1):
        raise ValueError(
            f"bias has {bias.shape[2]} columns of stride {bias.stride(2)}; it needs contiguous ones, at least one"
        )


def _check(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    check_shape("q", q, ("tokens", "heads", "head_dim"))
    _, heads, head_dim = q.shape
    check_shape("kv_pages", kv_pages, ("pages", 2, "kv_heads", PAGE_TOKENS, head_dim))
    if kv_pages.shape[2] == 0 or heads % kv_pages.shape[2]:
        raise ValueError(
            f"q has {heads} heads and kv_pages {kv_pages.shape[2]}; the first is a multiple of the second"
        )
    if q.stride(2) != 1 or (heads > 1 and q.stride(1) != head_dim):
        raise ValueError(
            f"q has strides {list(q.stride())}; the heads of a token lie contiguous: [any, {head_dim}, 1]"
        )
    check_contiguous("kv_pages", kv_pages)
    check_shape("page_table", page_table, ("seqs", "max_pages"))
    check_shape("query_starts", query_starts, (page_table.shape[0] + 1,))
    check_shape("kv_lens", kv_lens, page_table.shape[:1])
    for name, ints in (("page_table", page_table), ("query_starts", query_starts), ("kv_lens", kv_lens)):
        check_dtype(name, ints, torch.int32)
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None:
            check_shape(name, per_head, (heads,))
            check_dtype(name, per_head, torch.float32)
    check_shape("out", out, q.shape)
    check_alike("out", out, "q", q)
    check_contiguous("out", out)
