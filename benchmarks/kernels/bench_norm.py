"""RMSNorm, alone and with the residual add, beside torch's."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from tgi_kernels.norm import add_rms_norm, rms_norm

HIDDEN = 4096
EPS = 1e-5


def bench(report: Report, roofs: Roofs) -> None:
    weight = torch.randn(HIDDEN, dtype=torch.bfloat16, device="cuda")
    for tokens in (1, 16, 128, 1024, 8192):
        bytes_each = tokens * HIDDEN * 2
        count = copies_for(2 * bytes_each)
        x, residual, out = torch.randn(3, count, tokens, HIDDEN, device="cuda").bfloat16()
        case = f"bf16 hidden {HIDDEN} tokens {tokens}"

        plain = [lambda i=i: rms_norm(x[i], weight, EPS, out=out[i]) for i in range(count)]
        theirs = [lambda i=i: functional.rms_norm(x[i], (HIDDEN,), weight, EPS) for i in range(count)]
        _figures(report, "rms_norm", case, plain, theirs, 2 * bytes_each / roofs.copy)

        added = [lambda i=i: add_rms_norm(x[i], residual[i], weight, EPS, out=out[i]) for i in range(count)]
        their_added = [
            lambda i=i: functional.rms_norm(residual[i].add_(x[i]), (HIDDEN,), weight, EPS)
            for i in range(count)
        ]
        _figures(report, "add_rms_norm", case, added, their_added, 4 * bytes_each / roofs.copy)


def _figures(report: Report, bench_name: str, case: str, ours: list, theirs: list, floor_s: float) -> None:
    torch_us = time_isolated(theirs).median_s * 1e6
    report.add(
        bench_name,
        case,
        time_isolated(ours).median_s * 1e6,
        roof=floor_s * 1e6,
        baselines={"torch": torch_us},
    )
    report.add(
        bench_name, case, time_chain(ours).median_s * 1e6, metric="time in a chain", roof=floor_s * 1e6
    )


if __name__ == "__main__":
    main(bench)
