"""Token ids to vectors."""

from __future__ import annotations

from torch import Tensor, nn

from tgi_kernels.step import embed
from tgi_server.layers.weights import Weights


class Embedding(nn.Module):
    """A table of one vector per token id; on CPUs in the checkpoint's type, or bfloat16 if it is quantised there."""

    def __init__(self, weights: Weights, vocab_size: int, size: int) -> None:
        super().__init__()
        self.dtype = weights.dtype
        self.table = weights.table(vocab_size, size)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [tokens] int64. Returns a new [tokens, size] in the type of activations."""
        return embed(token_ids, self.table).to(self.dtype)
