"""The runner for an NVIDIA GPU: decode steps are graph replays, steps with prompts run kernel by kernel.

The host never waits for a step to start the next one. What a sequence carries from step to step stays on the
device under its row: page table and last sampled id. A decode step therefore needs from the host only the
sequences' lengths and the pages they got, one small copy.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tgi_kernels.attention_cuda import attention_decode_workspace, attention_prefill_workspace
from tgi_kernels.step import keep_ids
from tgi_server.config import PAGE_TOKENS, EngineConfig
from tgi_server.engine.batch import BatchBuilder, HostBatch
from tgi_server.engine.cuda_errors import named_errors
from tgi_server.engine.failures import OutOfDeviceMemory
from tgi_server.engine.graphs import DecodeBuffers, DeviceState, capture_all
from tgi_server.engine.plan import Asked, Plan, Work
from tgi_server.engine.request import Sampling
from tgi_server.engine.sampler import Drawn, Sampler
from tgi_server.engine.staging import Fetched, fetch, upload
from tgi_server.errors import StartupError
from tgi_server.layers.batch import Attend, Batch
from tgi_server.layers.cache import pool_shape
from tgi_server.layers.kinds import kinds
from tgi_server.layers.paged import Decoding, DecodingThenPrompts, Prompts
from tgi_server.memory_plan import GPU_RESERVE_BYTES, check_pages, pages_within
from tgi_server.models.decoder import Decoder

# What a GPU computes in, by config.dtype.
DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class GpuRunner:
    """Computes in 16 bits; the KV cache fills what weights and reserve leave, unless a size is given."""

    def __init__(self, config: EngineConfig, model: Decoder, dtype: torch.dtype) -> None:
        """Reserve the cache and capture the graphs. Raises StartupError for what there is too little room for."""
        self._model = model
        self._device = device = torch.device(config.device)
        rows, max_pages = config.max_sequences, -(-config.max_total_tokens // PAGE_TOKENS)
        self._sampler = Sampler(rows, config.max_total_tokens, model.vocab_size, device)
        self._buffers = DecodeBuffers.empty(rows, max_pages, model.vocab_size, dtype, device)
        kv = self._make_cache(config, torch.float8_e4m3fn if config.fp8_cache else dtype, max_pages)
        self.num_pages = kv.shape[1]
        self.matrices = kinds(model)
        self._state = DeviceState(
            kv,
            torch.zeros((rows, max_pages), dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            attention_decode_workspace(rows, kv[0], model.num_heads, max_pages),
            attention_prefill_workspace(kv[0], max_pages),
        )
        self._builder = BatchBuilder(rows, max_pages)
        self._graphs = capture_all(model, self._state, self._buffers, rows)
        self._run_largest_step(config)

    def _make_cache(self, config: EngineConfig, dtype: torch.dtype, max_pages: int) -> Tensor:
        specs = self._model.cache_specs
        if config.fp8_cache and specs[0].head_dim % 16:
            raise StartupError(
                f"--kv-cache-dtype fp8 needs heads of a multiple of 16 numbers; this model's have {specs[0].head_dim}: "
                "leave it out"
            )
        page_bytes = sum(spec.page_values() for spec in specs) * dtype.itemsize
        room = room_bytes(config.memory_fraction, self._device)
        fit = _pages_that_fit(room, page_bytes, max_pages, config.max_sequences)
        pages = min(fit, config.num_pages or fit)
        *shape, last = pool_shape(specs, pages)
        zeros = torch.zeros((*shape, last * dtype.itemsize), dtype=torch.uint8, device=self._device)
        return zeros.view(dtype)

    def _run_largest_step(self, config: EngineConfig) -> None:
        """Once, so that its kernels are loaded and its memory is kept; nothing in the cache is in use yet."""
        longest = config.max_total_tokens
        counts = [
            min(longest, config.max_batch_tokens - at) for at in range(0, config.max_batch_tokens, longest)
        ]
        asked = Asked(Sampling(temperature=1.0, top_k=2))
        works = [
            Work(
                id="", epoch=0, row=row, start=0, count=count, token_ids=[0] * count, first_page=0,
                new_pages=[0] * -(-count // PAGE_TOKENS), samples=True, asked=asked, top_logprobs=1,
            )
            for row, count in enumerate(counts[: config.max_sequences])
        ]  # fmt: skip
        try:
            self.launch(Plan(works)).result()
        except OutOfDeviceMemory as error:
            raise StartupError(
                f"a step of --max-batch-tokens {config.max_batch_tokens} finds too little memory: {error}; lower it"
            ) from error

    def device_bytes(self) -> int:
        """What torch holds of the device's memory, in use or kept for later steps."""
        return torch.cuda.memory_reserved(self._device)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Fetched:
        """Queue `plan`, which must not be empty, on the device, and return. Raises as `named_errors`."""
        with named_errors(self._device):
            if not plan.has_prompts:
                return self._decode(plan)
            self._sampler.read(plan)  # new sequences come with prompts
            return self._mixed(plan)

    def _decode(self, plan: Plan) -> Fetched:
        self._builder.extend(plan)
        seqs = len(plan.work)
        graph = next(graph for graph in self._graphs if graph.size >= seqs)
        graph.replay(plan)
        drawn = Drawn(self._buffers.ids[:seqs], self._buffers.logprobs[:seqs])
        if self._sampler.asks(plan):
            drawn = self._sampler.draw(plan, self._buffers.logits[:seqs], (drawn.ids, drawn.logprobs))
            keep_ids(drawn.ids, graph.rows[:seqs], self._state.last_ids)
        return fetch(plan, drawn, {})

    def _mixed(self, plan: Plan) -> Fetched:
        batch, sampling_rows = self._to_device(self._builder.build(plan))
        hidden = self._model(batch, self._state.kv)
        scored = self._sampler.score(plan, hidden, self._model.logits)
        drawn = self._sampler.draw(plan, self._model.logits(hidden[batch.logit_rows]))
        # Last: a step that fails before, for lack of memory, can be computed again from what it was fed.
        keep_ids(drawn.ids, sampling_rows, self._state.last_ids)
        return fetch(plan, drawn, scored)

    def _to_device(self, host: HostBatch) -> tuple[Batch, Tensor]:
        """The batch in one copy, and the rows that sample; brings the device's page table up to date."""
        token_ids, positions, slots, page_table, starts, lens, logit_rows, rows, fed_at, fed_rows, sampling = upload(
            self._device, host.token_ids, host.positions, host.slots, host.page_table, host.query_starts,
            host.kv_lens, host.logit_rows, host.rows, host.fed_at, host.fed_rows, host.sampling_rows,
        )  # fmt: skip
        self._state.page_table[rows, : page_table.shape[1]] = page_table
        token_ids[fed_at] = self._state.last_ids[fed_rows]
        decoding = len(host.fed_at)
        attend = self._attend(page_table, starts, lens, decoding)
        return Batch(token_ids, positions.unsqueeze(0), slots, attend, logit_rows), sampling

    def _attend(self, page_table: Tensor, starts: Tensor, kv_lens: Tensor, decoding: int) -> Attend:
        prompts = Prompts(
            page_table[decoding:],
            starts[decoding:] - decoding,
            kv_lens[decoding:],
            self._state.prefill_workspace,
        )
        if decoding == 0:
            return prompts
        return DecodingThenPrompts(
            Decoding(page_table[:decoding], kv_lens[:decoding], self._state.decode_workspace), prompts
        )


def room_bytes(fraction: float, device: torch.device) -> int:
    """What is free of this share of the device's memory, beside what this process has."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return min(free_bytes, int(total_bytes * fraction) - torch.cuda.memory_reserved(device))


def _pages_that_fit(room_bytes: int, page_bytes: int, max_pages: int, rows: int) -> int:
    """Pages of KV cache for this room but the reserve, never more than all rows could fill."""
    pages = pages_within(room_bytes - GPU_RESERVE_BYTES, page_bytes, max_pages, rows)
    beside = f"after the weights and a reserve of {GPU_RESERVE_BYTES / 2**30:.0f} GiB"
    check_pages(pages, page_bytes, max_pages, beside)
    return pages
