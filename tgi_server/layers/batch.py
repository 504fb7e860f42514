"""What one step computes, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, sequence after sequence, and where their keys and values live.

    A slot is page · 16 + row. Padding tokens have slot -1 and are sequences of their own, after the others;
    what is computed for them is left unread.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [axes, tokens] int32; one axis for text
    slots: Tensor  # [tokens] int64
    page_table: Tensor  # [seqs, max_pages] int32
    query_starts: Tensor  # [seqs + 1] int32: sequence i has tokens query_starts[i] to query_starts[i + 1]
    kv_lens: Tensor  # [seqs] int32, this step's tokens included
    logit_rows: Tensor  # [rows] int64: the tokens whose logits are wanted
