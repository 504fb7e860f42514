"""Attention on NVIDIA GPUs, specialised for a step's shape: a few queries for each sequence, or many.

`tgi_kernels.attention.attention` takes any batch; these two let the engine keep decode's rows apart, in a
graph. Both add up a row's keys in one order, that of `csrc/attention/tree.h`: a token's result has the same bits
from either, whatever its batch, how its prompt was cut and how many tokens were verified at once.
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


def attention_prefill_workspace(kv_pages: Tensor, max_pages: int) -> Tensor:
    """A workspace, int32, for `attention_prefill` of sequences of up to max_pages; may be used again and again.

    The counters in it are zero between calls; the rest is scratch. One call at a time, as with
    `attention_decode_workspace`.
    """
    num_ints = ops.attention_prefill_workspace(kv_pages.shape[4], max_pages)
    workspace = torch.empty(num_ints, dtype=torch.int32, device=kv_pages.device)
    workspace[:32].zero_()
    return workspace


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
    bias: Tensor | None = None,
    bias_by_distance: bool = False,
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
        workspace, k_scale, v_scale, bias, bias_by_distance,
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
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    workspace: Tensor | None = None,
    anchored: bool = True,
    bias: Tensor | None = None,
    bias_by_distance: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q · k · scale) · v for every query against the keys of its sequence up to its own position.

    q: [tokens, heads, head_dim] float16 or bfloat16, the queries of all sequences one after the other; tokens
    may lie apart. query_starts: [seqs + 1] int32. workspace: of `attention_prefill_workspace`; one is made where
    none is given. anchored: in the one order of additions; False: in a faster one on Hopper, whose bits depend on
    the sequence alone as well, but are not decode's. With a bias Hopper too runs the code of sm_80, anchored. The
    other arguments are those of `attention_decode`. Returns out, like q. Raises RuntimeError for arguments that do
    not fit each other.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if workspace is None:
        workspace = attention_prefill_workspace(kv_pages, page_table.shape[1])
    ops.attention_prefill(
        out, q, kv_pages, page_table, query_starts, kv_lens, scale, window, softcap, alibi_slopes, sinks,
        workspace, k_scale, v_scale, anchored, bias, bias_by_distance,
    )  # fmt: skip
    return out
