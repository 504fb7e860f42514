"""Products with weights of 4 and 8 bits beside cuBLAS on bf16 weights, isolated and in a dependent-launch chain."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated, time_sustained
from tgi_kernels.quant import quant_linear
from tgi_kernels.quant_cuda import PackedCuda, dequantise_packed, pack_cuda, quant_matmul
from tgi_kernels.quant_size import FUSED_PIECES_TOKENS
from tgi_kernels.quant_weight import QuantWeight

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096))  # in, out features
TOKENS = (1, 8, 16, 32, 64, 128, 256, 2048, 8192)
GROUP = 128


def random_weight(in_features: int, out_features: int, bits: int) -> PackedCuda:
    """Symmetric codes and half scales in groups of 128, as most GPTQ checkpoints have."""
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(out_features, in_features // GROUP, device="cuda") * 0.01 + 0.001).half()
    zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.int16)
    return pack_cuda(QuantWeight(codes, scales, zeros, GROUP, bits), torch.bfloat16)


def bench(report: Report, roofs: Roofs) -> None:
    for bits in (4, 8):
        for in_features, out_features in SHAPES:
            bench_shape(report, roofs, bits, in_features, out_features)


def bench_shape(report: Report, roofs: Roofs, bits: int, in_features: int, out_features: int) -> None:
    packed = random_weight(in_features, out_features, bits)
    weight_bytes = packed.words.nbytes + packed.pairs.nbytes
    dense = dequantise_packed(packed)
    sets = [packed] + [
        replace(packed, words=packed.words.clone(), pairs=packed.pairs.clone())
        for _ in range(copies_for(weight_bytes) - 1)
    ]
    for tokens in TOKENS if bits == 4 else TOKENS[:3]:
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(tokens, out_features, device="cuda", dtype=torch.bfloat16)
        work = 2 * tokens * in_features * out_features
        roof = max((weight_bytes + x.nbytes + out.nbytes) / roofs.copy, work / roofs.matmul) * 1e6
        case = f"int{bits} g{GROUP} {in_features}x{out_features} M={tokens}"
        launches = [lambda one=one: quant_matmul(x, one, out=out) for one in sets]
        if tokens > 256:
            quick = replace(packed, most_fused=FUSED_PIECES_TOKENS)
            cublas = time_sustained(lambda: torch.mm(x, dense.T, out=out)).median_s * 1e6
            for one, suffix in ((quick, ""), (packed, " deterministic")):
                ours = time_sustained(lambda one=one: quant_linear(x, one, out=out)).median_s * 1e6
                report.add("quant_matmul", case + suffix, ours, roof=roof, baselines={"cublas bf16": cublas})
            continue
        ours = time_isolated(launches, 10).median_s * 1e6
        report.add("quant_matmul", case, ours, roof=roof)
        chained = time_chain(launches, 10).median_s * 1e6
        report.add("quant_matmul", case, chained, metric="time in a chain", roof=roof)


if __name__ == "__main__":
    main(bench)
