"""What a step does before its first layer and after its last: inputs, embedding, and keeping what was drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes

register_fakes("decode_inputs", "keep_ids", "embed")

PAGE_TOKENS = 16


def decode_inputs(
    rows: Tensor,
    kv_lens: Tensor,
    added: Tensor,
    last_ids: Tensor,
    page_table: Tensor,
    *,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_tables: Tensor,
) -> None:
    """The inputs of a step of one token a sequence, from what the GPU keeps of each sequence by its row.

    rows: [seqs] int32, negative: idle. kv_lens: [seqs] int32, this step's token included. added: [seqs] int32,
    the page that the token begins, put into its row of page_table first; negative: none.
    last_ids: [rows] int64. page_table: [rows, max_pages] int32.
    Filled: token_ids [seqs] int64, last_ids of the row. positions [seqs] int32, kv_len − 1. slots [seqs] int64,
    page · 16 + row of the page, −1 if idle. page_tables [seqs, max_pages] int32, copies of the rows of page_table
    as far as kv_len reaches. On GPUs alone. Raises RuntimeError for arguments that do not fit each other.
    """
    ops.decode_inputs(
        rows, kv_lens, added, last_ids, page_table, token_ids, positions, slots, page_tables
    )  # fmt: skip


def keep_ids(ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
    """last_ids[rows[i]] = ids[i] where rows[i] is not negative.

    ids: [count] int64. rows: [count] int32, no two the same but for negative ones. last_ids: int64. On GPUs alone.
    Raises RuntimeError for arguments that do not fit each other.
    """
    ops.keep_ids(ids, rows, last_ids)


def embed(ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """table[ids], row by row.

    ids: [tokens] int64. table: [vocab, hidden], contiguous; on GPUs float32, bfloat16 or float16. out:
    [tokens, hidden], allocated when not given. Returns out. An id out of range raises IndexError on CPUs and gives
    NaN on GPUs, which cannot raise: it spoils its own sequence and no other.
    """
    if out is None:
        out = torch.empty((len(ids), table.shape[1]), dtype=table.dtype, device=table.device)
    if not table.is_cuda:
        return torch.index_select(table, 0, ids, out=out)
    try:
        ops.embed(ids, table, out)
    except RuntimeError:
        check_shape("ids", ids, ("tokens",))
        check_dtype("ids", ids, torch.int64)
        check_shape("table", table, ("vocab", "hidden"))
        check_contiguous("table", table)
        check_shape("out", out, (len(ids), table.shape[1]))
        check_alike("out", out, "table", table)
        check_contiguous("out", out)
        raise
    return out
