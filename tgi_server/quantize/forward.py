"""A decoder over whole pieces of text, without an engine."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_server.config import PAGE_TOKENS, ModelConfig
from tgi_server.layers.batch import Batch
from tgi_server.layers.paged import AnySequences
from tgi_server.models.decoder import Decoder


class Forward:
    """Runs one piece after another on a CPU; the cache is that of one piece."""

    def __init__(self, model: Decoder, config: ModelConfig, tokens: int) -> None:
        self.model = model
        pages = -(-tokens // PAGE_TOKENS)
        spec = model.cache_specs[0]
        self._kv = torch.zeros(config.num_layers, pages, 2, spec.kv_heads, PAGE_TOKENS, spec.head_dim)
        self._table = torch.arange(pages, dtype=torch.int32).unsqueeze(0)

    @torch.inference_mode()
    def hidden(self, ids: Tensor) -> Tensor:
        """ids: [tokens] int64. Returns [tokens, hidden] after the final norm."""
        found: Tensor = self.model(self._batch(ids), self._kv)
        return found

    @torch.inference_mode()
    def traced(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`log_probabilities`, and what each block adds to the residual, [tokens, hidden] each."""
        residual = self.embedded(ids)
        added = []
        for index in range(len(self.model.blocks)):
            before = residual.clone()
            self.run_block(index, residual)
            added.append(residual - before)
        return self.model.logits(self.model.norm(residual)[:-1]).log_softmax(-1), added

    @torch.inference_mode()
    def log_probabilities(self, ids: Tensor) -> Tensor:
        """[tokens - 1, vocab] fp32: of each token after the first, given those before it."""
        return self.model.logits(self.hidden(ids)[:-1]).log_softmax(-1)

    @torch.inference_mode()
    def embedded(self, ids: Tensor) -> Tensor:
        """ids: [tokens] int64. Returns [tokens, hidden], what the first block gets."""
        return self.model.embed(self._batch(ids))

    @torch.inference_mode()
    def run_block(self, index: int, residual: Tensor) -> None:
        """Take a piece through one block. residual: [tokens, hidden], changed in place."""
        batch = self._batch(torch.zeros(len(residual), dtype=torch.int64))
        self.model.blocks[index](residual, batch, self._kv[index])

    def _batch(self, ids: Tensor) -> Batch:
        count = len(ids)
        attend = AnySequences(
            self._table, torch.tensor([0, count], dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
        )
        positions = torch.arange(count)
        return Batch(ids, positions.int().unsqueeze(0), positions, attend, positions)
