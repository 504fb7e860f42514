"""Decode steps as CUDA graphs: one replay instead of some three hundred launches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from tgi_kernels.sampling import greedy
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.plan import Plan
from tgi_server.engine.staging import TURNS
from tgi_server.layers.batch import Batch
from tgi_server.layers.paged import Decoding
from tgi_server.models.decoder import Decoder

# Row counts that have a graph of their own; a step replays the next larger one, its spare rows idle.
SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 513, 32))


@dataclass(frozen=True)
class DeviceState:
    """What stays on the device from step to step."""

    kv: Tensor  # [layers, pages, 2, kv_heads, 16, head_dim]
    page_table: Tensor  # [rows + 1, max_pages] int32, by row; the last row takes what has no destination
    last_ids: Tensor  # [rows] int64: what each row sampled last
    workspace: Tensor  # of attention_decode


class DecodeGraph:
    """One token for each of the first `size` rows of the tables."""

    def __init__(self, size: int, model: Decoder, state: DeviceState) -> None:
        self.size = size
        self._model = model
        self._state = state
        # kv_lens (0: the row is idle), then where in the page table a page is added, then which.
        self._inputs = torch.zeros((3, size), dtype=torch.int32, device=state.kv.device)
        self._turns = cycle(
            [torch.zeros((3, size), dtype=torch.int32, pin_memory=True) for _ in range(TURNS)]
        )
        self._nowhere = (state.page_table.shape[0] - 1) * state.page_table.shape[1]
        self._inputs[1] = self._nowhere
        self._graph = torch.cuda.CUDAGraph()
        self._outputs: tuple[Tensor, Tensor]

    def capture(self, pool: Any) -> None:  # torch gives the handle no public type
        """Record the step. Every kernel must have run before: loading one is not allowed while capturing."""
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = self.step()

    def replay(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """(ids, logprobs), [size] each, by row; valid until the next replay of any graph."""
        host = next(self._turns).numpy()
        host[0] = 0
        host[1] = self._nowhere
        width = self._state.page_table.shape[1]
        for work in plan.work:
            host[0, work.row] = work.start + 1
            if work.new_pages:  # one at most: a step adds one token
                host[1, work.row] = work.row * width + work.first_page
                host[2, work.row] = work.new_pages[0]
        self._inputs.copy_(torch.from_numpy(host), non_blocking=True)
        self._graph.replay()
        return self._outputs

    def step(self) -> tuple[Tensor, Tensor]:
        """The computation that is recorded."""
        size, state = self.size, self._state
        kv_lens, added_at, added = self._inputs
        state.page_table.view(-1).index_copy_(0, added_at.long(), added)
        page_table, active = state.page_table[:size], kv_lens > 0
        positions = (kv_lens - 1).clamp_(min=0)
        pages = page_table.gather(1, (positions // PAGE_TOKENS).long().unsqueeze(1)).squeeze(1)
        slots = torch.where(active, pages.long() * PAGE_TOKENS + positions % PAGE_TOKENS, -1)
        batch = Batch(
            token_ids=state.last_ids[:size],
            positions=positions.unsqueeze(0),
            slots=slots,
            attend=Decoding(page_table, kv_lens, state.workspace),
            logit_rows=torch.empty(0, dtype=torch.int64, device=kv_lens.device),  # all
        )
        ids, logprobs = greedy(self._model.logits(self._model(batch, state.kv)))
        state.last_ids[:size] = torch.where(active, ids, state.last_ids[:size])
        return ids, logprobs


def capture_all(model: Decoder, state: DeviceState) -> list[DecodeGraph]:
    """Graphs for every size up to the number of rows, smallest first; they share their memory."""
    rows = len(state.last_ids)
    graphs = [DecodeGraph(size, model, state) for size in (*(s for s in SIZES if s < rows), rows)]
    pool = torch.cuda.graph_pool_handle()
    with torch.inference_mode():
        for graph in reversed(graphs):
            graph.step()
            graph.capture(pool)
    return graphs
