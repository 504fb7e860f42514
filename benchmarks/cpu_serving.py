"""The CPU path over HTTP beside transformers: one command, one table, JSON lines for every instruction set.

    python -m benchmarks.cpu_serving                    # AVX2 and AVX-512, as far as this CPU has them: 7 minutes each
    python -m benchmarks.cpu_serving --isa avx2 --quick # a minute, to see that it works; writes nothing

For each set a server is started with `--cpu-isa`, warmed up, loaded and ended; then transformers does the same work
in fp32 and bf16, in a process whose libraries are held to the same set. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cpu import PROMPT_TOKENS, Transformers
from benchmarks.harness import ROOT, Report, csrc_sha256
from benchmarks.serving import Goals, Load, Run, measure, percentile, summarise
from benchmarks.startup import start_server
from tgi_kernels import cpu

# What transformers and the libraries below it read: it shall use no wider instructions than our kernels. For AVX-512
# nothing is held back: AVX512-BF16 and AMX, where there are, are its own.
HELD_TO: Mapping[str, Mapping[str, str]] = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {},
}
DTYPES = ("float32", "bfloat16")
GOALS = Goals(first_s=2.0, gap_s=0.2)
LONG_PROMPT = 4000
STREAMS = 200


@dataclass(frozen=True)
class Size:
    """How much is asked; the small one only shows that everything works."""

    one_tokens: int = 256
    many_tokens: int = 128
    repeats: int = 3
    streams: int = STREAMS
    stream_tokens: int = 120
    long_prompt: int = LONG_PROMPT
    arrivals: int = 60
    their_tokens: int = 64  # of each stream by transformers


QUICK = Size(
    one_tokens=16,
    many_tokens=8,
    repeats=1,
    streams=20,
    stream_tokens=40,
    long_prompt=500,
    arrivals=6,
    their_tokens=4,
)


@contextmanager
def server(model: Path, isa: str, threads: int) -> Iterator[str]:
    """The address of a server for 256 sequences."""
    options = {
        "--device": "cpu",
        "--cpu-isa": isa,
        "--num-threads": threads,
        "--max-sequences": 256,
        "--max-queue": 512,
        "--log-level": "warn",
    }
    process, url = start_server(model, *(str(part) for pair in options.items() for part in pair))
    try:
        yield url
    finally:
        process.terminate()
        process.wait()


def best(url: str, repeats: int, requests: int, output_tokens: int) -> Run:
    """The run of most tokens a second, of prompts of 16 tokens."""
    runs = [
        measure(Load(url, requests, math.inf, 16, output_tokens, seed=1000 * requests + i))
        for i in range(repeats)
    ]
    return max(runs, key=lambda run: run.output_rate)


def bench(report: Report, url: str, size: Size, others: Mapping[str, Mapping[str, float]]) -> None:
    # Every load has a seed of its own: no prompt may be in the cache.
    measure(Load(url, 2, math.inf, 300, 4))  # every kernel has run, and memory is touched

    def add(
        case: str, value: float, metric: str = "rate", unit: str = "tok/s", better: str = "higher"
    ) -> None:
        beside = {name: rates[case] for name, rates in others.items() if case in rates}
        report.add("cpu over HTTP", case, value, metric=metric, unit=unit, better=better, baselines=beside)

    one = best(url, size.repeats, 1, size.one_tokens)
    add("one stream", one.output_rate)
    many = best(url, size.repeats, 16, size.many_tokens)
    add("16 streams", many.output_rate)
    prompts = [measure(Load(url, 1, math.inf, PROMPT_TOKENS, 2, seed=20 + i)) for i in range(size.repeats)]
    add("prefill", PROMPT_TOKENS / statistics.median(run.answered[0].first_s for run in prompts))
    crowd = measure(Load(url, size.streams, math.inf, 16, size.stream_tokens, size.long_prompt, seed=30))
    gaps = crowd.gaps_s()
    case = f"{size.streams} streams, then a prompt of {size.long_prompt}"
    add(case, percentile(gaps, 0.99) / statistics.mean(gaps), "p99 / mean between tokens", "ratio", "lower")
    arriving = measure(Load(url, size.arrivals, 1.0, 128, 64, seed=40))
    for run in (one, many, crowd, arriving):
        summarise(run, GOALS, report)


def rates_of_transformers(model: Path, isa: str, threads: int, tokens: int) -> dict[str, dict[str, float]]:
    """Tokens a second of each case, by the type it computes in; measured in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu_serving",
        "--model",
        str(model),
        "--threads",
        str(threads),
    ]
    environment = {**os.environ, **HELD_TO[isa]}
    done = subprocess.run(
        [*command, "--transformers", str(tokens)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
    )
    rates = json.loads(done.stdout.splitlines()[-1])
    return {f"transformers {name}": rates[name] for name in DTYPES}


def print_rates_of_transformers(model: Path, threads: int, tokens: int) -> None:
    torch.set_num_threads(threads)
    rates = {}
    for name in DTYPES:
        other = Transformers(model, getattr(torch, name))
        other.decode_rate(1, 4)
        rates[name] = {
            "one stream": other.decode_rate(1, tokens),
            "16 streams": other.decode_rate(16, tokens // 2),
            "prefill": other.prefill_rate(),
        }
    print(json.dumps(rates))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--isa", nargs="+", choices=cpu.available_isas(), default=cpu.available_isas()[1:])
    parser.add_argument("--threads", type=int, default=cpu.num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes, no file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--transformers", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.transformers:
        print_rates_of_transformers(args.model, args.threads, args.transformers)
        return
    size = QUICK if args.quick else Size()
    tables = []
    for isa in args.isa:
        report = Report(f"cpu-{isa}-{args.threads}core", csrc_sha256())
        others = rates_of_transformers(args.model, isa, args.threads, size.their_tokens)
        with server(args.model, isa, args.threads) as url:
            bench(report, url, size, others)
        if not args.quick:
            report.write(args.out / report.device / "serving.jsonl")
        tables.append(f"{report.device}\n{report.table()}")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
