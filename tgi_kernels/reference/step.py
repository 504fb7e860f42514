"""What a step does before its first layer and after its last, sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_TOKENS = 16


def decode_inputs(
    rows: Tensor, kv_lens: Tensor, added: Tensor, last_ids: Tensor, page_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as the op's. Returns token_ids, positions, slots and the page table with what was added."""
    page_table = page_table.clone()
    inputs = []
    for row, kv_len, page in zip(rows.tolist(), kv_lens.tolist(), added.tolist(), strict=True):
        if row < 0:
            inputs.append((0, 0, -1))
            continue
        position = kv_len - 1
        if page >= 0:
            page_table[row, position // PAGE_TOKENS] = page
        slot = int(page_table[row, position // PAGE_TOKENS]) * PAGE_TOKENS + position % PAGE_TOKENS
        inputs.append((int(last_ids[row]), position, slot))
    token_ids, positions, slots = torch.tensor(inputs).unbind(1)
    return token_ids, positions.int(), slots, page_table


def keep_ids(ids: Tensor, rows: Tensor, last_ids: Tensor) -> Tensor:
    """Returns last_ids as it is after the op."""
    kept = last_ids.clone()
    for token, row in zip(ids.tolist(), rows.tolist(), strict=True):
        if row >= 0:
            kept[row] = token
    return kept


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids]."""
    return torch.stack([table[token] for token in ids.tolist()])
