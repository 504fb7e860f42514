"""Greedy choice from logits, beside torch."""

from __future__ import annotations

import torch

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from tgi_kernels.sampling import greedy

VOCAB = 128256


def bench(report: Report, roofs: Roofs) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rows in (1, 8, 64, 256):
            bytes_each = rows * VOCAB * dtype.itemsize
            count = copies_for(bytes_each)
            logits = torch.randn(count, rows, VOCAB, device="cuda").to(dtype)
            ids = torch.empty(rows, dtype=torch.int64, device="cuda")
            logprobs = torch.empty(rows, device="cuda")
            ours = [lambda i=i: greedy(logits[i], ids, logprobs) for i in range(count)]
            argmax = [lambda i=i: torch.argmax(logits[i], -1) for i in range(count)]
            both = [lambda i=i: torch.log_softmax(logits[i], -1).max(-1) for i in range(count)]
            case, roof = f"greedy {name} B={rows}", bytes_each / roofs.read * 1e6
            baselines = {
                "torch argmax alone": time_isolated(argmax).median_s * 1e6,
                "torch with logprob": time_isolated(both).median_s * 1e6,
            }
            ours_us = time_isolated(ours).median_s * 1e6
            report.add("sampling", case, ours_us, roof=roof, baselines=baselines)
            chain_us = time_chain(ours).median_s * 1e6
            report.add("sampling", case, chain_us, metric="time in a chain", roof=roof)


if __name__ == "__main__":
    main(bench)
