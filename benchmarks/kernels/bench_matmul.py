"""Skinny matrix products beside cuBLAS, isolated and in a dependent-launch chain."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from tgi_kernels.skinny_matmul import skinny_matmul

SHAPES = ((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096), (4096, 128256))  # in, out features
TOKENS = (1, 8, 16, 32, 64)


def bench(report: Report, roofs: Roofs) -> None:
    for in_features, out_features in SHAPES:
        weight_bytes = in_features * out_features * 2
        count = copies_for(weight_bytes)
        weight = torch.randn(count, out_features, in_features, device="cuda", dtype=torch.bfloat16)
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(tokens, out_features, device="cuda", dtype=torch.bfloat16)
            ours = [lambda i=i: skinny_matmul(x, weight[i], out=out) for i in range(count)]
            theirs = [lambda i=i: torch.mm(x, weight[i].T, out=out) for i in range(count)]
            error = (skinny_matmul(x, weight[0]).float() - functional.linear(x, weight[0]).float()).norm()
            assert error < 0.01 * functional.linear(x, weight[0]).float().norm(), "wrong before it is fast"
            case = f"bf16 M={tokens} {in_features}x{out_features}"
            moved = weight_bytes + x.nbytes + out.nbytes
            roof = max(moved / roofs.copy, 2 * tokens * weight[0].numel() / roofs.matmul) * 1e6
            cublas_us = time_isolated(theirs).median_s * 1e6
            ours_us = time_isolated(ours).median_s * 1e6
            report.add("matmul", case, ours_us, roof=roof, baselines={"cublas": cublas_us})
            chain_us = time_chain(ours).median_s * 1e6
            cublas_chain_us = time_chain(theirs).median_s * 1e6
            report.add(
                "matmul",
                case,
                chain_us,
                metric="time in a chain",
                roof=roof,
                baselines={"cublas": cublas_chain_us},
            )


if __name__ == "__main__":
    main(bench)
