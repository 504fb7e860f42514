"""The figures this project set itself for one H100, and how far the results of a device are.

    python -m benchmarks.targets [--device h200]

An H200 has the H100's arithmetic and 1.4 of its memory bandwidth: there, figures bound by memory are easier to reach.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness import ROOT


@dataclass(frozen=True)
class Target:
    """`least` must be reached, `goal` is wished for; whether more or less is better the result says.

    of: case of the same bench and metric, of whose figure they are multiples.
    """

    bench: str
    case: str
    metric: str
    least: float
    goal: float
    of: str = ""


_KV = "bf16 32/8/128 page16"
_LLAMA = "llama-3.1-8b bf16"
_RAGGED_US = (63 * 1024 + 131072) * 2 * 8 * 128 * 2 / 3e12 * 1e6  # its keys and values at 3 TB/s
_NORM_US = 8192 * 4096 * 2 * 2 / 1e12 * 1e6  # 8192 tokens read and written, at 1 TB/s

_INT4, _GPTQ, _FP8 = "int4 g128", "llama-3.1-8b gptq-int4-g128", "llama-3.1-8b fp8-w8a8"
# By in and out features: for 1 to 16 tokens.
_FEW_US = {"4096x4096": (7.5, 4.5), "4096x28672": (28, 24), "14336x4096": (17, 13)}

QUANTISED = (
    *(
        Target("quant_matmul", f"{_INT4} {shape} M={tokens}", "time in a chain", least, goal)
        for shape, (least, goal) in _FEW_US.items()
        for tokens in (1, 16)
    ),
    Target("quant_matmul", f"{_INT4} 4096x28672 M=64", "time", 46, 32),
    Target("quant_matmul", f"{_INT4} 4096x28672 M=128", "time", 61, 50),
    Target("quant_matmul", f"{_INT4} 4096x28672 M=2048", "time", 720, 680),
    Target("quant_matmul", f"{_INT4} 4096x28672 M=8192", "time", 2870, 2780),
    *(
        Target("quant_matmul", f"{kind} {shape} M=1", "time in a chain", 1.35, 1.2, of=f"{_INT4} {shape} M=1")
        for kind in ("nf4 g64", "exl2 4.0")
        for shape in _FEW_US
    ),
    Target("fp8_matmul", "w8a8 per token 4096x4096 M=1 incl. rounding", "time", 11, 8),
    Target("fp8_matmul", "w8a8 per token 4096x4096 M=2048 incl. rounding", "time", 72, 66),
    Target("fp8_matmul", "w8a8 128x128 4096x28672 M=2048 incl. rounding", "rate", 900, 1050),
    Target("decode_step", f"{_GPTQ} B=1", "time", 2.9, 2.2),
    Target("decode_step", f"{_GPTQ} B=64", "time", 7.5, 6.1),
    Target("decode_step", f"{_GPTQ} desc_act B=1", "time", 1.05, 1.01, of=f"{_GPTQ} B=1"),
    Target("prefill", f"{_GPTQ} 1x8192", "time", 1.05, 1.05, of=f"{_LLAMA} 1x8192"),
    Target("prefill", f"{_GPTQ} desc_act 1x8192", "time", 1.05, 1.01, of=f"{_GPTQ} 1x8192"),
    Target("decode_step", f"{_FP8} B=1", "time", 4.3, 3.6),
    Target("prefill", f"{_FP8} 1x8192", "time", 0.65, 0.65, of=f"{_LLAMA} 1x8192"),
)

TARGETS = (
    *QUANTISED,
    Target("attention_decode", f"{_KV} 1x1024", "time", 9, 6),
    Target("attention_decode", f"{_KV} 1x8192", "time", 17, 14.5),
    Target("attention_decode", f"{_KV} 8x1024", "time", 17, 13.5),
    Target("attention_decode", f"{_KV} 64x4096", "time", 375, 352),
    Target("attention_decode", "fp8 32/8/128 page16 64x4096", "time", 200, 185),
    Target(
        "attention_decode", f"{_KV} ragged 63x1024+1x131072", "time", 1.15 * _RAGGED_US, 1.08 * _RAGGED_US
    ),
    Target("attention_prefill", f"{_KV} causal 1x8192", "rate", 520, 620),
    Target("attention_prefill", f"{_KV} causal 4x2048", "rate", 430, 520),
    Target("attention_prefill", f"{_KV} causal 16x512", "rate", 250, 310),
    Target("attention_prefill", f"{_KV} causal chunk 2048 on 100k", "rate", 500, 600),
    Target("matmul", "bf16 M=1 4096x4096", "time in a chain", 13.5, 12.5),
    Target("matmul", "bf16 M=1 4096x28672", "time in a chain", 82, 78),
    Target("matmul", "bf16 M=1 14336x4096", "time in a chain", 43, 40),
    Target("rms_norm", "bf16 hidden 4096 tokens 8192", "time", _NORM_US / 2.6, _NORM_US / 2.9),
    Target("sampling", "topk_topp B=1", "time", 30, 12),
    Target("sampling", "topk_topp B=64", "time", 90, 40),
    Target("sampling", "topk_topp B=256", "time", 220, 120),
    Target("sampling", "greedy B=1", "time", 15, 8),
    Target("sampling", "greedy B=64", "time", 30, 20),
    Target("sampling", "greedy B=256", "time", 52, 47),
    Target("decode_step", f"{_LLAMA} B=1", "time", 6.3, 5.6),
    Target("host_step", f"{_LLAMA} B=1", "time", 1.0, 1.0),
    Target("host_step", f"{_LLAMA} B=256", "time", 2.0, 2.0),
    Target("decode_step", f"{_LLAMA} B=8", "time", 6.8, 6.0),
    Target("decode_step", f"{_LLAMA} B=64", "time", 10.0, 9.0),
    Target("decode_step", f"{_LLAMA} B=256", "time", 21.4, 19.6),
    Target("decode_step", f"{_LLAMA} fp8-kv B=256", "time", 15.5, 14),
    Target("prefill", f"{_LLAMA} 1x1024", "time", 29, 24.5),
    Target("prefill", f"{_LLAMA} 1x8192", "time", 216, 200),
    Target("prefill", f"{_LLAMA} 16x2048", "time", 775, 718),
    Target("offline", f"{_LLAMA} 512 requests 512/256", "output_tokens", 9500, 10300),
    Target("serving", f"{_LLAMA} 512/256, 24 req/s", "tpot p50", 14.2, 12.5),
    Target("serving", f"{_LLAMA} 512/256, 24 req/s", "itl p99", 38, 25),
    Target("serving", f"{_LLAMA} 512/256, 24 req/s", "ttft p99", 138, 90),
    Target("startup", "llama-3.1-8b dummy weights", "first token", 25, 8),
    Target("startup", "llama-3.1-8b 16 GB of safetensors in the page cache", "first token", 30, 12),
)


def verdict(target: Target, value: float, better: str) -> str:
    """What the figure has reached."""
    sign = 1 if better == "lower" else -1
    if sign * value <= sign * target.goal:
        return "goal"
    return "pass" if sign * value <= sign * target.least else "MISSED"


def rows(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """One for each target: bench, case, metric, value, what must be, what is wished for, verdict."""
    found = {(one["bench"], one["case"], one["metric"]): one for one in records}
    for wanted in TARGETS:
        record = found.get((wanted.bench, wanted.case, wanted.metric))
        other = found.get((wanted.bench, wanted.of, wanted.metric))
        unit = other["value"] if other else math.nan if wanted.of else 1.0
        target = replace(wanted, least=wanted.least * unit, goal=wanted.goal * unit)
        shown = f"{record['value']:.4g} {record['unit']}" if record else "-"
        is_known = record is not None and not math.isnan(unit)
        limits = [f"{n:.4g}" if n == n else "-" for n in (target.least, target.goal)]  # noqa: PLR0124 - no NaN
        yield (
            target.bench, target.case, target.metric, shown, *limits,
            verdict(target, record["value"], record["better"]) if is_known else "not measured",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h200", help="folder of benchmarks/results")
    folder = ROOT / "benchmarks" / "results" / parser.parse_args().device
    records = [
        json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.open(encoding="utf-8")
    ]
    table = [("bench", "case", "metric", "value", "pass", "goal", ""), *rows(records)]
    widths = [max(len(row[i]) for row in table) for i in range(7)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
