"""What one step computes, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Attend(Protocol):
    """Knows the step's sequences and their pages; `layers.paged` has one for each kind of step."""

    def __call__(self, q: Tensor, kv_pages: Tensor, scale: float, *, window: int) -> Tensor:
        """softmax(q · k · scale) · v, causal, for every token of the step.

        q: [tokens, heads, head_dim]. kv_pages: one layer's [pages, 2, kv_heads, 16, head_dim]. `window`: how
        many tokens one sees, itself included; 0 is all. Returns a tensor like q.
        """


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, sequence after sequence, and where their keys and values live.

    A slot is page · 16 + row. Padding tokens have slot -1; what is computed for them is left unread.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [axes, tokens] int32; one axis for text
    slots: Tensor  # [tokens] int64
    attend: Attend
    logit_rows: Tensor  # [rows] int64: the tokens whose logits are wanted
    adapters: Tensor | None = None  # [tokens] int32: what each goes through, 0 for none; None: none of them
