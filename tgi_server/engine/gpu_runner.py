"""The runner for an NVIDIA GPU: decode steps are graph replays, steps with prompts run kernel by kernel.

The host never waits for a step to start the next one. What a sequence carries from step to step stays on the
device under its row: page table and last sampled id. A decode step therefore needs from the host only the
sequences' lengths and the pages they got, one small copy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tgi_kernels.attention_cuda import attention_decode_workspace
from tgi_kernels.sampling import greedy
from tgi_server.config import PAGE_TOKENS, EngineConfig
from tgi_server.engine.batch import BatchBuilder, HostBatch, Ints
from tgi_server.engine.graphs import DecodeGraph, DeviceState, capture_all
from tgi_server.engine.plan import Plan
from tgi_server.engine.staging import Downloads, Fetched, Uploads
from tgi_server.layers.batch import Attend, Batch
from tgi_server.layers.paged import Decoding, DecodingThenPrompts, Prompts
from tgi_server.memory_plan import GPU_RESERVE_BYTES, check_pages, pages_within
from tgi_server.models.decoder import Decoder


class GpuRunner:
    """Computes in 16 bits; the KV cache fills what weights and reserve leave, unless a size is given."""

    def __init__(self, config: EngineConfig, model: Decoder, dtype: torch.dtype) -> None:
        self._model = model
        self._device = torch.device(config.device)
        rows, max_pages = config.max_sequences, -(-config.max_total_tokens // PAGE_TOKENS)
        page_values = sum(spec.page_values() for spec in model.cache_specs)
        fit = _pages_that_fit(page_values * dtype.itemsize, max_pages, rows, self._device)
        self.num_pages = min(fit, config.num_pages or fit)
        spec = model.cache_specs[0]
        shape = (len(model.cache_specs), self.num_pages, 2, spec.kv_heads, PAGE_TOKENS, spec.head_dim)
        kv = torch.zeros(shape, dtype=dtype, device=self._device)
        self._state = DeviceState(
            kv,
            torch.zeros((rows + 1, max_pages), dtype=torch.int32, device=self._device),
            torch.zeros(rows, dtype=torch.int64, device=self._device),
            attention_decode_workspace(rows, kv[0], model.num_heads, max_pages),
        )
        self._builder = BatchBuilder(rows, max_pages)
        self._upload = Uploads(3 * config.max_batch_tokens + rows * (max_pages + 8), self._device)
        self._download = Downloads(rows)
        self._graphs: list[DecodeGraph] = capture_all(model, self._state)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Fetched:
        """Queue `plan`, which must not be empty, on the device, and return."""
        if plan.has_prompts:
            return self._mixed(plan)
        self._builder.extend(plan)
        last_row = max(work.row for work in plan.work)
        graph = next(graph for graph in self._graphs if graph.size > last_row)
        ids, logprobs = graph.replay(plan)
        return self._download(ids, logprobs, [work.row for work in plan.work])

    def _mixed(self, plan: Plan) -> Fetched:
        batch, sampling_rows = self._to_device(self._builder.build(plan))
        hidden = self._model(batch, self._state.kv)
        ids, logprobs = greedy(self._model.logits(hidden[batch.logit_rows]))
        self._state.last_ids[sampling_rows] = ids
        return self._download(ids, logprobs, range(len(ids)))

    def _to_device(self, host: HostBatch) -> tuple[Batch, Tensor]:
        """The batch in one copy, and the rows that sample; brings the device's page table up to date."""
        token_ids, positions, slots, table, starts, lens, logit_rows, rows, fed_at, fed_rows, sampling = self._upload(
            host.token_ids, host.positions, host.slots, host.page_table.ravel(), host.query_starts, host.kv_lens,
            host.logit_rows, host.rows, host.fed_at, host.fed_rows, host.sampling_rows,
        )  # fmt: skip
        page_table = table.view(host.page_table.shape).int()
        self._state.page_table[rows, : page_table.shape[1]] = page_table
        token_ids[fed_at] = self._state.last_ids[fed_rows]
        decoding = len(host.fed_at)
        attend = self._attend(page_table, starts.int(), lens.int(), decoding, np.diff(host.query_starts))
        return Batch(token_ids, positions.int().unsqueeze(0), slots, attend, logit_rows), sampling

    def _attend(
        self, page_table: Tensor, starts: Tensor, kv_lens: Tensor, decoding: int, counts: Ints
    ) -> Attend:
        prompts = Prompts(
            page_table[decoding:],
            starts[decoding:] - decoding,
            kv_lens[decoding:],
            int(counts[decoding:].max()),
        )
        if decoding == 0:
            return prompts
        return DecodingThenPrompts(
            Decoding(page_table[:decoding], kv_lens[:decoding], self._state.workspace), prompts
        )


def _pages_that_fit(page_bytes: int, max_pages: int, rows: int, device: torch.device) -> int:
    """Pages of KV cache for what is free now, never more than all rows could fill."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    pages = pages_within(free_bytes - GPU_RESERVE_BYTES, page_bytes, max_pages, rows)
    beside = f"after the weights and a reserve of {GPU_RESERVE_BYTES / 2**30:.0f} GiB"
    check_pages(pages, page_bytes, max_pages, beside)
    return pages
