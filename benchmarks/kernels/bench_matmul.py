"""Matrix products beside cuBLAS: isolated and in a dependent-launch chain, the large ones also sustained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

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
from tgi_kernels.activation import silu_and_mul
from tgi_kernels.hopper_matmul import matmul

SHAPES = ((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096), (4096, 128256))  # in, out features
TOKENS = (1, 8, 16, 32, 64)  # memory's roof
MORE_TOKENS = (96, 128, 256, 512)  # of the first four shapes: between the two roofs
MANY_TOKENS = (1024, 2048, 8192)  # arithmetic's roof


def bench(report: Report, roofs: Roofs) -> None:
    for in_features, out_features in SHAPES:
        count = copies_for(in_features * out_features * 2)
        weight = torch.randn(count, out_features, in_features, device="cuda", dtype=torch.bfloat16)
        of_layer = out_features < 100_000
        for tokens in TOKENS + (MORE_TOKENS if of_layer else ()):
            _replayed(report, roofs, weight, tokens)
        for tokens in MANY_TOKENS if of_layer else ():
            _sustained(report, roofs, weight[0], tokens)


def _replayed(report: Report, roofs: Roofs, weight: Tensor, tokens: int) -> None:
    x, out, case = _inputs(weight[0], tokens)
    ours: Sequence[Launch] = [partial(matmul, x, w, out=out) for w in weight]
    theirs: Sequence[Launch] = [partial(torch.mm, x, w.T, out=out) for w in weight]
    moved = weight[0].nbytes + x.nbytes + out.nbytes
    roof = max(moved / roofs.copy, 2 * tokens * weight[0].numel() / roofs.matmul) * 1e6
    for metric, timer in (("time", time_isolated), ("time in a chain", time_chain)):
        baseline = timer(theirs).median_s * 1e6
        report.add(
            "matmul",
            case,
            timer(ours).median_s * 1e6,
            metric=metric,
            roof=roof,
            baselines={"cublas": baseline},
        )


def _sustained(report: Report, roofs: Roofs, weight: Tensor, tokens: int) -> None:
    """TFLOP/s back to back, plain and with what follows the product in a layer."""
    x, out, case = _inputs(weight, tokens)
    tera = 2 * tokens * weight.numel() / 1e12
    rates = [("rate", lambda: matmul(x, weight, out=out), lambda: torch.mm(x, weight.T, out=out))]
    if weight.shape[0] == 4096:
        rates.append(
            (
                "rate with residual",
                lambda: matmul(x, weight, residual=out, out=out),
                lambda: out.add_(x @ weight.T),
            )
        )
    if weight.shape[0] == 28672:
        half = out[:, : weight.shape[0] // 2].contiguous()
        rates.append(
            (
                "rate with gate",
                lambda: matmul(x, weight, gate="silu", out=half),
                lambda: silu_and_mul(torch.mm(x, weight.T, out=out), half),
            )
        )
    for metric, ours, theirs in rates:
        # In turns: power allows less to whoever comes after a busy tenth of a second.
        turns = [[time_sustained(call, 0.05).median_s for call in (theirs, ours)] for _ in range(3)]
        baseline, value = (tera / median(seconds) for seconds in zip(*turns, strict=True))
        report.add(
            "matmul",
            case,
            value,
            metric=metric,
            unit="TFLOP/s",
            better="higher",
            roof=roofs.matmul / 1e12,
            baselines={"cublas": baseline},
        )


def _inputs(weight: Tensor, tokens: int) -> tuple[Tensor, Tensor, str]:
    """x, out and the case's name; the product is checked before it is timed."""
    out_features, in_features = weight.shape
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(tokens, out_features, device="cuda", dtype=torch.bfloat16)
    want = torch.mm(x, weight.T)
    assert (matmul(x, weight, out=out) - want).norm() < 0.01 * want.norm(), "wrong before it is fast"
    return x, out, f"bf16 M={tokens} {in_features}x{out_features}"


if __name__ == "__main__":
    main(bench)
