"""Products of few tokens with weights of other kinds than 4 and 8 bits, beside those of 4 bits in groups of 128."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from benchmarks.kernels.bench_quant_matmul import random_weight
from tgi_kernels.quant_cuda import PackedCuda, quant_matmul
from tgi_kernels.quant_runs import PackedRuns, dequantise_runs, pack_runs, runs_matmul
from tgi_kernels.quant_segments import Segments
from tgi_kernels.quant_size import Values
from tgi_kernels.quant_weight import QuantWeight

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096))  # in, out features
TOKENS = (1, 8, 16, 64)


def weight(
    in_features: int,
    out_features: int,
    group: int,
    bits: int,
    values: Values = "integer",
    scale: torch.dtype = torch.float16,
    *,
    has_offsets: bool = False,
) -> QuantWeight:
    """Random codes; integers have zero points in the middle, unless they have offsets."""
    groups = in_features // group
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8, device="cuda")
    if values == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0
    scales = (torch.rand(out_features, groups, device="cuda") * 0.01 + 0.001).to(scale)
    middle = torch.full((out_features, groups), 1 << (bits - 1), dtype=torch.int16, device="cuda")
    offsets = torch.randn(out_features, groups, device="cuda") * 0.01 if has_offsets else None
    zeros = middle if values == "integer" and not has_offsets else None
    return QuantWeight(codes, scales, zeros, group, bits, None, values, offsets)


def exl2(in_features: int, out_features: int) -> Segments:
    """4.0 bits on average, in groups of 128: a tenth of the columns in 5 bits, as many in 3, the rest in 4."""
    groups = in_features // 128
    tenth = round(groups / 10)
    runs = ((5, tenth), (4, groups - 2 * tenth), (3, tenth))
    return Segments(tuple(weight(128 * count, out_features, 128, bits) for bits, count in runs))


KINDS: dict[str, Callable[[int, int], QuantWeight | Segments]] = {
    "nf4 g64": lambda k, n: weight(k, n, 64, 4, "nf4", torch.float32),
    "exl2 4.0": exl2,
    "int3 g128": lambda k, n: weight(k, n, 128, 3),
    "int6 g128": lambda k, n: weight(k, n, 128, 6),
    "e4m3 rows": lambda k, n: weight(k, n, k, 8, "e4m3", torch.float32),
    "q4_k g32": lambda k, n: weight(k, n, 32, 4, scale=torch.float32, has_offsets=True),
}


def bench(report: Report, roofs: Roofs) -> None:
    for in_features, out_features in SHAPES:
        shape = f"{in_features}x{out_features}"
        four = random_weight(in_features, out_features, 4)
        beside = {tokens: time_of(roofs, four, tokens) for tokens in TOKENS}
        for name, make in KINDS.items():
            packed = pack_runs(make(in_features, out_features), torch.bfloat16)
            for tokens in TOKENS:
                roof, isolated, chained = time_of(roofs, packed, tokens)
                case = f"{name} {shape} M={tokens}"
                report.add(
                    "quant_matmul", case, isolated, roof=roof, baselines={"int4 g128": beside[tokens][1]}
                )
                report.add(
                    "quant_matmul",
                    case,
                    chained,
                    metric="time in a chain",
                    roof=roof,
                    baselines={"int4 g128": beside[tokens][2]},
                )
            made = time_isolated([lambda packed=packed: dequantise_runs(packed)], 10).median_s * 1e6
            report.add("quant_dequantise", f"{name} {shape}", made)


def time_of(roofs: Roofs, packed: PackedCuda | PackedRuns, tokens: int) -> tuple[float, float, float]:
    """µs: of the bytes at the rate of a copy, isolated, and in a chain."""
    tensors = {k: v for k, v in vars(packed).items() if isinstance(v, Tensor) and v.is_cuda}
    size = sum(tensor.nbytes for tensor in tensors.values())

    def clone() -> PackedCuda | PackedRuns:
        changes: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors.items()}
        return replace(packed, **changes)

    clones = [clone() for _ in range(copies_for(size) - 1)]
    x = torch.randn(tokens, packed.in_features, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(tokens, packed.out_features, device="cuda", dtype=torch.bfloat16)

    def multiply(one: PackedCuda | PackedRuns) -> Tensor:
        if isinstance(one, PackedCuda):
            return quant_matmul(x, one, out=out)
        return runs_matmul(x, one, out=out)

    launches = [lambda one=one: multiply(one) for one in (packed, *clones)]
    roof = (size + x.nbytes + out.nbytes) / roofs.copy * 1e6
    isolated, chained = time_isolated(launches, 10), time_chain(launches, 10)
    return roof, isolated.median_s * 1e6, chained.median_s * 1e6


if __name__ == "__main__":
    main(bench)
