"""Token ids to vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tgi_server.layers.weights import Weights


class Embedding(nn.Module):
    """A table of one vector per token id, kept in the checkpoint's type."""

    def __init__(self, weights: Weights, vocab_size: int, size: int) -> None:
        super().__init__()
        self.table = weights.stored("weight", vocab_size, size).to(weights.device, copy=True)
        self.dtype = weights.dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [tokens] int64. Returns a new [tokens, size] in the type of activations."""
        return F.embedding(token_ids, self.table).to(self.dtype)
