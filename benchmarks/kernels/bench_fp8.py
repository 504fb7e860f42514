"""Products of float8 by float8, rounding the inputs included and not, beside torch._scaled_mm (cuBLAS, CUTLASS)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated, time_sustained
from tgi_kernels._library import ops
from tgi_kernels.fp8 import BLOCK, fp8_matmul, quantise_e4m3

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096))  # in, out features
TOKENS = (1, 16, 64, 128, 256, 2048, 8192)
SUSTAINED = 256  # tokens above which power decides: launches follow each other for 0.1 s
FP8_OVER_BF16 = 2  # of the tensor cores


def bench(report: Report, roofs: Roofs) -> None:
    for in_features, out_features in SHAPES:
        for in_blocks in (False, True):
            bench_shape(report, roofs, in_features, out_features, in_blocks=in_blocks)


def bench_shape(
    report: Report, roofs: Roofs, in_features: int, out_features: int, *, in_blocks: bool
) -> None:
    weight = (torch.randn(out_features, in_features, device="cuda") * 100).clamp(-448, 448)
    codes = weight.to(torch.float8_e4m3fn).view(torch.uint8)
    # 32 and 112 blocks of columns are whole vectors of 4.
    shape = (out_features // BLOCK, in_features // BLOCK) if in_blocks else (out_features,)
    scales = torch.rand(shape, device="cuda") * 0.001 + 0.0005
    sets = [(codes, scales)] + [(codes.clone(), scales.clone()) for _ in range(copies_for(codes.nbytes) - 1)]
    kind = "128x128" if in_blocks else "per token"
    for tokens in TOKENS:
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(tokens, out_features, device="cuda", dtype=torch.bfloat16)
        rounded = quantise_e4m3(x, in_blocks=in_blocks)
        work = 2 * tokens * in_features * out_features
        floors = ((codes.nbytes + x.nbytes + out.nbytes) / roofs.copy, work / (FP8_OVER_BF16 * roofs.matmul))
        roof = max(floors) * 1e6

        def product(one: tuple[Tensor, Tensor], *, rounds: bool) -> None:
            if rounds:
                ops.quantise_e4m3(x, None, float("inf"), in_blocks, *rounded)
            fp8_matmul(*rounded, *one, dtype=x.dtype, in_blocks=in_blocks, out=out)

        for rounds in (True, False):
            what = "incl. rounding" if rounds else "alone"
            case = f"w8a8 {kind} {in_features}x{out_features} M={tokens} {what}"
            if tokens > SUSTAINED:
                taken = time_sustained(partial(product, sets[0], rounds=rounds)).median_s * 1e6
                theirs = (
                    None if in_blocks or rounds else {"torch._scaled_mm": scaled_mm(rounded, sets[0], out)}
                )
                report.add("fp8_matmul", case, taken, roof=roof, baselines=theirs)
                rate = work / taken / 1e6
                report.add("fp8_matmul", case, rate, metric="rate", unit="TFLOP/s", better="higher")
                continue
            launches = [partial(product, one, rounds=rounds) for one in sets]
            report.add("fp8_matmul", case, time_isolated(launches, 10).median_s * 1e6, roof=roof)
            chained = time_chain(launches, 10).median_s * 1e6
            report.add("fp8_matmul", case, chained, metric="time in a chain", roof=roof)


def scaled_mm(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], out: Tensor) -> float:
    """µs of torch's product with a scale a row of both."""
    a, b = x[0].view(torch.float8_e4m3fn), weight[0].view(torch.float8_e4m3fn).T
    rows, columns = x[1].view(-1, 1), weight[1].view(1, -1)
    return (
        time_sustained(
            lambda: torch._scaled_mm(a, b, scale_a=rows, scale_b=columns, out_dtype=out.dtype)
        ).median_s
        * 1e6
    )


if __name__ == "__main__":
    main(bench)
