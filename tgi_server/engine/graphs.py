"""Decode steps as CUDA graphs: one replay instead of some three hundred launches."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgi_kernels.sampling import greedy
from tgi_kernels.step import decode_inputs, keep_ids
from tgi_server.engine.plan import Plan
from tgi_server.layers.batch import Batch
from tgi_server.layers.paged import Decoding
from tgi_server.models.decoder import Decoder

log = logging.getLogger(__name__)

# Sequence counts that have a graph of their own; a step replays the next larger one, its last places idle.
SIZES = (
    1,
    2,
    4,
    8,
    *range(16, 65, 8),
    *range(80, 257, 16),
    *range(288, 513, 32),
    640,
    768,
    1024,
    1536,
    2048,
    3072,
)


@dataclass(frozen=True)
class DeviceState:
    """What stays on the device from step to step, by row: a sequence keeps its row as long as it runs."""

    kv: Tensor  # [layers, pages, 2, kv_heads, 16, head_dim]
    page_table: Tensor  # [rows, max_pages] int32
    last_ids: Tensor  # [rows] int64: what each row sampled last
    decode_workspace: Tensor  # of attention_decode
    prefill_workspace: Tensor  # of attention_prefill


@dataclass(frozen=True)
class DecodeBuffers:
    """A decode step's inputs and outputs, by place in the plan; all graphs use the beginnings of these."""

    uploaded: Tensor  # [3 * seqs] int32: a step of n has n rows, n kv_lens, n added pages, as decode_inputs takes them
    token_ids: Tensor  # [seqs] int64
    positions: Tensor  # [seqs] int32
    slots: Tensor  # [seqs] int64
    page_tables: Tensor  # [seqs, max_pages] int32
    logits: Tensor  # [seqs, vocab]
    ids: Tensor  # [seqs] int64
    logprobs: Tensor  # [seqs] float32

    @classmethod
    def empty(
        cls, seqs: int, max_pages: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> DecodeBuffers:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            uploaded=zeros(3 * seqs, dtype=torch.int32),
            token_ids=zeros(seqs),
            positions=zeros(seqs, dtype=torch.int32),
            slots=zeros(seqs),
            page_tables=zeros(seqs, max_pages, dtype=torch.int32),
            logits=zeros(seqs, vocab, dtype=dtype),
            ids=zeros(seqs),
            logprobs=zeros(seqs, dtype=torch.float32),
        )


class DecodeGraph:
    """One token for each of up to `size` sequences."""

    def __init__(self, size: int, model: Decoder, state: DeviceState, buffers: DecodeBuffers) -> None:
        self.size = size
        self._model = model
        self._state = state
        self._buffers = buffers
        self._uploaded = buffers.uploaded[: 3 * size].view(3, size)
        self.rows = self._uploaded[0]  # [size] int32, of the step that was replayed last; negative: idle
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, pool: Any) -> None:  # torch gives the handle no public type
        """Record the step on the current stream, which must not be the default one.

        It runs once before, with all places idle: kernels cannot be loaded while capturing.
        """
        self._uploaded.fill_(-1)
        self._uploaded[1] = 0
        self.step()
        self._graph.capture_begin(pool)
        self.step()
        self._graph.capture_end()

    def replay(self, plan: Plan) -> None:
        """Queue the step; what it finds is in the buffers, by place in the plan, until the next replay of any graph."""
        pinned = torch.empty((3, self.size), dtype=torch.int32, pin_memory=True)
        host, seqs = pinned.numpy(), len(plan.work)
        host[0] = host[2] = -1
        host[1] = 0
        # One new page at most: a step adds one token.
        host[:, :seqs] = [
            [work.row for work in plan.work],
            [work.start + 1 for work in plan.work],
            [work.new_pages[0] if work.new_pages else -1 for work in plan.work],
        ]
        self._uploaded.copy_(pinned, non_blocking=True)
        self._graph.replay()

    def step(self) -> None:
        """The computation that is recorded."""
        size, state, buffers = self.size, self._state, self._buffers
        rows, kv_lens, added = self._uploaded
        page_tables = buffers.page_tables[:size]
        token_ids, positions, slots = (
            part[:size] for part in (buffers.token_ids, buffers.positions, buffers.slots)
        )
        decode_inputs(
            rows, kv_lens, added, state.last_ids, state.page_table,
            token_ids=token_ids, positions=positions, slots=slots, page_tables=page_tables,
        )  # fmt: skip
        attend = Decoding(page_tables, kv_lens, state.decode_workspace)
        batch = Batch(token_ids, positions.unsqueeze(0), slots, attend, logit_rows=token_ids[:0])  # all
        logits = self._model.logits(self._model(batch, state.kv), buffers.logits[:size])
        ids, _ = greedy(logits, buffers.ids[:size], buffers.logprobs[:size])
        keep_ids(ids, rows, state.last_ids)


def capture_all(
    model: Decoder, state: DeviceState, buffers: DecodeBuffers, seqs: int
) -> Sequence[DecodeGraph]:
    """Graphs for every size up to `seqs` sequences, smallest first; they share their memory."""
    graphs = [
        DecodeGraph(size, model, state, buffers) for size in (*(size for size in SIZES if size < seqs), seqs)
    ]
    began, (free_bytes, _) = time.monotonic(), torch.cuda.mem_get_info(state.kv.device)
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(state.kv.device)
    stream.wait_stream(torch.cuda.current_stream(state.kv.device))
    with torch.inference_mode(), torch.cuda.stream(stream):
        for graph in reversed(graphs):
            graph.capture(pool)
    torch.cuda.current_stream(state.kv.device).wait_stream(stream)
    taken_bytes = free_bytes - torch.cuda.mem_get_info(state.kv.device)[0]
    log.info(
        "%d graphs of decode steps, up to %d sequences, captured in %.1f s; they take %.0f MiB",
        len(graphs), seqs, time.monotonic() - began, taken_bytes / 2**20,
    )  # fmt: skip
    return graphs
