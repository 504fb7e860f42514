"""Token ids to vectors."""

from __future__ import annotations

from torch import Tensor, nn

from tgi_kernels.step import embed
from tgi_server.layers.weights import Weights


class Embedding(nn.Module):
    """A table of one vector per token id, on CPUs kept in the checkpoint's type."""

    def __init__(self, weights: Weights, vocab_size: int, size: int) -> None:
        super().__init__()
        self.dtype = weights.dtype
        table = weights.stored("weight", vocab_size, size)
        self.table = table.clone() if weights.device.type == "cpu" else weights.on_device(table)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [tokens] int64. Returns a new [tokens, size] in the type of activations."""
        return embed(token_ids, self.table).to(self.dtype)
