"""Gated activations, beside torch's."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from tgi_kernels.activation import silu_and_mul

INNER = 14336


def bench(report: Report, roofs: Roofs) -> None:
    for tokens in (1, 16, 128, 1024, 8192):
        bytes_each = 3 * tokens * INNER * 2
        count = copies_for(bytes_each)
        x = torch.randn(count, tokens, 2 * INNER, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(count, tokens, INNER, dtype=torch.bfloat16, device="cuda")
        ours = [lambda i=i: silu_and_mul(x[i], out=out[i]) for i in range(count)]
        theirs = [
            lambda i=i: torch.mul(functional.silu(x[i, :, :INNER]), x[i, :, INNER:], out=out[i])
            for i in range(count)
        ]
        case, roof = f"bf16 inner {INNER} tokens {tokens}", bytes_each / roofs.copy * 1e6
        torch_us = time_isolated(theirs).median_s * 1e6
        ours_us = time_isolated(ours).median_s * 1e6
        report.add("silu_and_mul", case, ours_us, roof=roof, baselines={"torch": torch_us})
        chain_us = time_chain(ours).median_s * 1e6
        report.add("silu_and_mul", case, chain_us, metric="time in a chain", roof=roof)


if __name__ == "__main__":
    main(bench)
