"""Attention on NVIDIA GPUs, specialised for a step's shape: a few queries for each sequence, or many.

`tgi_kernels.attention.attention` takes any batch; these two let the engine keep decode's rows apart, in a
graph. Results of decode do not depend on the batch, nor on how many of a sequence's tokens are verified at once;
those of prefill not on the batch, nor on how a prompt is cut. The two sum in different orders and agree to
rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._library import ops, register_fakes

register_fakes("attention_decode", "attention_prefill")


def attention_decode_workspace(
    seqs: int, kv_pages: Tensor, heads: int, max_pages: int, *, queries_per_seq: int = 1
) -> Tensor:
    """A zeroed workspace, uint8, for `attention_decode` with up to these sizes; may be used again and again.

    Any call that needs no more bytes fits it. One call at a time: calls that run at once on different streams
    need one each. A call that a fault cut off leaves it unfit.
    """
    _, _, kv_heads, _, head_dim = kv_pages.shape
    num_bytes = ops.attention_decode_workspace(seqs, heads, kv_heads, head_dim, queries_per_seq, max_pages)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=kv_pages.device)


def attention_prefill_workspace(device: torch.device) -> Tensor:
    """A workspace for `attention_prefill`, of any size; may be used again and again, by one call at a time."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def attention_decode(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    workspace: Tensor,
    *,
    queries_per_seq: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q · k · scale) · v for the last queries_per_seq tokens of every sequence.

    q: [seqs · queries_per_seq, heads, head_dim] float16 or bfloat16; tokens may lie apart. head_dim: a multiple
    of 8 up to 256 (of 16 with a float8 cache).
    kv_pages: [pages, 2, kv_heads, 16, head_dim] of q's dtype, or float8_e4m3fn with k_scale and v_scale.
    page_table: [seqs, max_pages] int32. kv_lens: [seqs] int32, this step's tokens included; 0: the rows become
    zero. workspace: of `attention_decode_workspace`. The other arguments are those of
    `tgi_kernels.attention.attention`. Returns out, like q. Raises RuntimeError for arguments that do not fit each
    other; page numbers and lengths are not checked: they are on the device.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    ops.attention_decode(
        out, q, kv_pages, page_table, kv_lens, queries_per_seq, scale, window, softcap, alibi_slopes, sinks,
        workspace, k_scale, v_scale,
    )  # fmt: skip
    return out


def attention_prefill(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    scale: float,
    *,
    max_query_len: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q · k · scale) · v for every query against the keys of its sequence up to its own position.

    q: [tokens, heads, head_dim] float16 or bfloat16, the queries of all sequences one after the other; tokens
    may lie apart. query_starts: [seqs + 1] int32. max_query_len: the most queries of a sequence, if known.
    workspace: of `attention_prefill_workspace`, made if not given; calls that run at once need one each.
    The other arguments are those of `attention_decode`. Returns out, like q.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if workspace is None:
        workspace = attention_prefill_workspace(q.device)
    ops.attention_prefill(
        out, q, kv_pages, page_table, query_starts, kv_lens, max_query_len, scale, window, softcap,
        alibi_slopes, sinks, k_scale, v_scale, workspace,
    )  # fmt: skip
    return out
