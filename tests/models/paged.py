"""Runs a decoder over sequences whose pages lie scattered, as the engine would."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tgi_server.config import PAGE_TOKENS, ModelConfig
from tgi_server.layers.batch import Batch
from tgi_server.layers.paged import AnySequences
from tgi_server.models.decoder import Decoder


class Paged:
    """A decoder with a cache of its own, and sequences that grow by `step`."""

    def __init__(self, model: Decoder, config: ModelConfig, num_pages: int = 64) -> None:
        self.model = model
        shape = (config.num_layers, num_pages, 2, config.num_kv_heads, PAGE_TOKENS, config.head_dim)
        # What a page held before must not matter: NaN would spread.
        self.kv = torch.full(shape, torch.nan)
        self.free = list(range(num_pages))
        random.Random(0).shuffle(self.free)
        self.pages: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, new: dict[str, list[int]], padding: int = 0) -> dict[str, Tensor]:
        """Compute the new tokens of each sequence together. Returns logits [tokens, vocab] by sequence."""
        batch = self._batch(new, padding)
        with torch.inference_mode():
            hidden = self.model(batch, self.kv)
            logits = self.model.logits(hidden[batch.logit_rows])
        counts = [len(tokens) for tokens in new.values()]
        return dict(zip(new, logits.split(counts), strict=True))

    def _batch(self, new: dict[str, list[int]], padding: int) -> Batch:
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for name, tokens in new.items():
            done = self.lengths.get(name, 0)
            self.lengths[name] = done + len(tokens)
            pages = self.pages.setdefault(name, [])
            while len(pages) * PAGE_TOKENS < self.lengths[name]:
                pages.append(self.free.pop())
            for position in range(done, self.lengths[name]):
                positions.append(position)
                slots.append(pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
            starts.append(len(positions))
        width = max(len(self.pages[name]) for name in new)
        table = [self.pages[name] + [0] * (width - len(self.pages[name])) for name in new]
        ids = [token for tokens in new.values() for token in tokens]
        lengths = [self.lengths[name] for name in new]
        if padding:  # a sequence that leaves nothing in the cache
            starts.append(len(positions) + padding)
            table.append([0] * width)
            lengths.append(padding)
        return Batch(
            token_ids=torch.tensor(ids + [0] * padding),
            positions=torch.tensor([positions + [0] * padding], dtype=torch.int32),
            slots=torch.tensor(slots + [-1] * padding),
            attend=AnySequences(
                torch.tensor(table, dtype=torch.int32),
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor(lengths, dtype=torch.int32),
            ),
            logit_rows=torch.arange(len(ids)),
        )
