"""Rotary embedding fused with the KV write, beside the same in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from tgi_kernels.rope import rotary_kv_write

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16


def bench(report: Report, roofs: Roofs) -> None:
    angles = torch.outer(torch.arange(8192.0), 500000.0 ** -torch.arange(0, 1, 2 / HEAD_DIM))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).cuda()
    for tokens in (1, 16, 128, 1024, 8192):
        bytes_each = 2 * tokens * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2
        count = copies_for(bytes_each)
        qkv = torch.randn(count, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        pages = qkv.new_zeros(count, (tokens + PAGE - 1) // PAGE, 2, KV_HEADS, PAGE, HEAD_DIM)
        positions = torch.randint(0, 8192, (tokens,), dtype=torch.int32, device="cuda")
        slots = torch.arange(tokens, device="cuda")

        def ours(i: int) -> None:
            rotary_kv_write(q[i], k[i], v[i], pages[i], cos_sin, positions, slots)

        def theirs(i: int) -> None:
            _torch_rotary(q[i], k[i], v[i], pages[i], cos_sin, positions, slots)

        case, roof = f"bf16 32/8/128 tokens {tokens}", bytes_each / roofs.copy * 1e6
        launches = [lambda i=i: ours(i) for i in range(count)]
        torch_us = time_isolated([lambda i=i: theirs(i) for i in range(count)]).median_s * 1e6
        ours_us = time_isolated(launches).median_s * 1e6
        report.add("rotary_kv_write", case, ours_us, roof=roof, baselines={"torch": torch_us})
        chain_us = time_chain(launches).median_s * 1e6
        report.add("rotary_kv_write", case, chain_us, metric="time in a chain", roof=roof)


def _torch_rotary(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor
) -> None:
    cos, sin = cos_sin[positions.long()].bfloat16()[:, None].chunk(2, -1)
    for x in (q, k):
        low, high = x.chunk(2, -1)
        x.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], -1))
    page, row = slots // PAGE, slots % PAGE
    pages[page, 0, :, row] = k
    pages[page, 1, :, row] = v


if __name__ == "__main__":
    main(bench)
