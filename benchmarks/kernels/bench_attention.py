"""Decode and prefill attention over a paged cache, beside torch's scaled dot product over a dense one.

python -m benchmarks.kernels.bench_attention: Llama-3.1-8B's heads. Decode's roof is its K and V, read once at
the rate of a device copy; prefill's is the rate of a large matrix product, products that the mask spares not
counted. Results are compared with torch's before they are timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import (
    Launch,
    Report,
    Roofs,
    copies_for,
    main,
    time_chain,
    time_isolated,
    time_sustained,
)
from tgi_kernels.attention_cuda import (
    attention_decode,
    attention_decode_workspace,
    attention_prefill,
    attention_prefill_workspace,
)

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
SHAPE = f"{HEADS}/{KV_HEADS}/{HEAD_DIM} page{PAGE_TOKENS}"
POOL_BYTES = 4 << 30


class Pool:
    """One pool of pages; every launch of a rotation has pages of its own, scattered over it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.page_bytes = 2 * KV_HEADS * PAGE_TOKENS * HEAD_DIM * dtype.itemsize
        self.pages = POOL_BYTES // self.page_bytes
        self.kv = torch.empty(self.pages, 2, KV_HEADS, PAGE_TOKENS, HEAD_DIM, dtype=dtype, device="cuda")
        for first in range(0, self.pages, 8192):
            part = self.kv[first : first + 8192]
            part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
        self.order = torch.randperm(self.pages, device="cuda").to(torch.int32)

    def tables(self, kv_lens: Sequence[int]) -> list[Tensor]:
        """Page tables of one batch, as many as find the L2 cache cold."""
        needed = [-(-keys // PAGE_TOKENS) for keys in kv_lens]
        copies = min(copies_for(sum(needed) * self.page_bytes), max(1, self.pages // sum(needed)))
        tables = torch.zeros(copies, len(kv_lens), max(needed), dtype=torch.int32, device="cuda")
        taken = 0
        for copy in range(copies):
            for seq, pages in enumerate(needed):
                tables[copy, seq, :pages] = self.order[taken : taken + pages]
                taken += pages
        return list(tables)

    def dense(self, table: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """bf16 keys and values [seqs, kv_heads, keys, head_dim] of sequences of one length."""
        rows = self.kv[table.long()].to(torch.bfloat16).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[..., :keys, :]
        return rows[0].contiguous(), rows[1].contiguous()


def decode(
    report: Report, roofs: Roofs, pool: Pool, name: str, kv_lens: Sequence[int], queries: int = 1
) -> None:
    """One row: µs of a layer's attention in a decode or verify step."""
    seqs, keys = len(kv_lens), kv_lens[0]
    q = torch.randn(seqs * queries, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    tables = pool.tables(kv_lens)
    workspace = attention_decode_workspace(seqs, pool.kv, HEADS, tables[0].shape[1], queries_per_seq=queries)
    out = torch.empty_like(q)

    def launch(table: Tensor) -> Launch:
        return lambda: attention_decode(
            q, pool.kv, table, lens, SCALE, workspace, queries_per_seq=queries, out=out
        )

    baselines: dict[str, float] = {}
    if len(set(kv_lens)) == 1:
        heads_first = q.unflatten(0, (seqs, queries)).transpose(1, 2)
        rows = [pool.dense(table, keys) for table in tables]
        seen = torch.arange(keys, device="cuda") <= torch.arange(keys - queries, keys, device="cuda")[:, None]
        want = F.scaled_dot_product_attention(heads_first, *rows[0], attn_mask=seen, enable_gqa=True)
        launch(tables[0])()
        check(name, out.unflatten(0, (seqs, queries)).transpose(1, 2), want)
        if queries == 1:
            dense = [
                lambda k=k, v=v: F.scaled_dot_product_attention(heads_first, k, v, enable_gqa=True)
                for k, v in rows
            ]
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                baselines["flash sdpa, dense"] = time_isolated(dense).median_s * 1e6
    launches = [launch(table) for table in tables]
    isolated_us = time_isolated(launches).median_s * 1e6
    num_bytes = sum(kv_lens) * 2 * KV_HEADS * HEAD_DIM * pool.kv.element_size()
    baselines |= {
        "chain": time_chain(launches).median_s * 1e6,
        "GB/s of KV": num_bytes / isolated_us / 1e3,
    }
    floor_us = num_bytes / roofs.copy * 1e6
    report.add("attention_decode", name, isolated_us, roof=floor_us, baselines=baselines)


def prefill(
    report: Report, roofs: Roofs, pool: Pool, name: str, queries: int, keys: int, seqs: int = 1
) -> None:
    """Two rows: TFLOP/s of a layer's causal attention, masked products not counted: the faster order, decode's."""
    q = torch.randn(seqs * queries, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    lens = torch.full((seqs,), keys, dtype=torch.int32, device="cuda")
    starts = torch.arange(seqs + 1, dtype=torch.int32, device="cuda") * queries
    table = pool.tables([keys] * seqs)[0]
    out, workspace = torch.empty_like(q), attention_prefill_workspace(pool.kv, table.shape[1])

    def ours(anchored: bool) -> Launch:
        return lambda: attention_prefill(
            q, pool.kv, table, starts, lens, SCALE, workspace=workspace, anchored=anchored, out=out
        )

    tflop = 4 * HEADS * HEAD_DIM * seqs * (queries * keys - queries * (queries - 1) / 2) / 1e12
    baselines: dict[str, float] = {}
    if queries == keys:
        k, v = (rows.repeat_interleave(HEADS // KV_HEADS, dim=1) for rows in pool.dense(table, keys))
        heads_first = q.unflatten(0, (seqs, queries)).transpose(1, 2).contiguous()

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(heads_first, k, v, is_causal=True)

        want = dense()
        for anchored in (True, False):
            ours(anchored)()
            check(name, out.unflatten(0, (seqs, queries)).transpose(1, 2), want)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                label = backend.name.split("_")[0].lower()
                baselines[f"{label} sdpa, dense"] = tflop / time_sustained(dense).median_s
    for suffix, anchored in (("", False), (" anchored", True)):
        seconds = time_sustained(ours(anchored)).median_s
        report.add(
            "attention_prefill",
            name + suffix,
            tflop / seconds,
            metric="rate",
            unit="TFLOP/s",
            better="higher",
            roof=roofs.matmul / 1e12,
            baselines=baselines | {"us": seconds * 1e6},
        )


def biased(report: Report, pool: Pool) -> None:
    """Two rows: what a bias by distance of 128 columns makes of decode at 1x1024 and of prefill at 1x8192."""
    bias = torch.randn(1, HEADS, 128, device="cuda")
    lens = torch.tensor([1024], dtype=torch.int32, device="cuda")
    tables = pool.tables([1024])
    workspace = attention_decode_workspace(1, pool.kv, HEADS, tables[0].shape[1])
    q = torch.randn(8192, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    steps: list[Launch] = [
        lambda table=table: attention_decode(
            q[:1], pool.kv, table, lens, SCALE, workspace, bias=bias, bias_by_distance=True, out=out[:1]
        )
        for table in tables
    ]
    baselines = {"chain": time_chain(steps).median_s * 1e6}
    isolated_us = time_isolated(steps).median_s * 1e6
    report.add("attention_decode", f"bf16 {SHAPE} 1x1024 with a bias", isolated_us, baselines=baselines)
    table = pool.tables([8192])[0]
    starts, of_prompt = torch.tensor([[0, 8192], [8192, 0]], dtype=torch.int32, device="cuda")
    scratch = attention_prefill_workspace(pool.kv, table.shape[1])
    seconds = time_sustained(
        lambda: attention_prefill(
            q,
            pool.kv,
            table,
            starts,
            of_prompt[:1],
            SCALE,
            workspace=scratch,
            bias=bias,
            bias_by_distance=True,
            out=out,
        )
    ).median_s
    report.add(
        "attention_prefill",
        f"bf16 {SHAPE} causal 1x8192 with a bias",
        4 * HEADS * HEAD_DIM * 8192 * 8193 / 2 / 1e12 / seconds,
        metric="rate",
        unit="TFLOP/s",
        better="higher",
        baselines={"us": seconds * 1e6},
    )


def check(name: str, got: Tensor, want: Tensor) -> None:
    """Fails where ours is not torch's result to a few roundings."""
    error = (got.float() - want.float()).abs().max().item()
    if not error < 0.03:
        raise AssertionError(f"{name}: differs from torch by {error}")


def bench(report: Report, roofs: Roofs) -> None:
    """Every row of the table."""
    pool = Pool(torch.bfloat16)
    for seqs, keys in ((1, 1024), (1, 8192), (8, 1024), (64, 1024), (64, 4096)):
        decode(report, roofs, pool, f"bf16 {SHAPE} {seqs}x{keys}", [keys] * seqs)
    decode(report, roofs, pool, f"bf16 {SHAPE} ragged 63x1024+1x131072", [1024] * 63 + [131072])
    for queries in (4, 8):
        decode(report, roofs, pool, f"bf16 {SHAPE} verify q={queries} 64x4096", [4096] * 64, queries)
    biased(report, pool)
    for seqs, length in ((1, 8192), (4, 2048), (16, 512)):
        prefill(report, roofs, pool, f"bf16 {SHAPE} causal {seqs}x{length}", length, length, seqs)
    prefill(report, roofs, pool, f"bf16 {SHAPE} causal chunk 2048 on 100k", 2048, 102400)
    del pool
    pool = Pool(torch.float8_e4m3fn)
    for seqs, keys in ((1, 1024), (64, 4096)):
        decode(report, roofs, pool, f"fp8 {SHAPE} {seqs}x{keys}", [keys] * seqs)
    prefill(report, roofs, pool, f"fp8 {SHAPE} causal 1x8192", 8192, 8192)


if __name__ == "__main__":
    main(bench)
