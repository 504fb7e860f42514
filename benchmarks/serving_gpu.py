"""A server on a GPU under load: Llama 3.1 8B's shape, random weights, 512 tokens in and 256 out, several rates.

    python -m benchmarks.serving_gpu [--rates 8 24] [--seconds 12]

Arrivals are Poisson and do not wait for answers; the client is another process on the same machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvloop

from benchmarks.harness import ROOT, Report, csrc_sha256, device_name
from benchmarks.serving import Load, Trace, percentile, run
from benchmarks.startup import model_folder, start_server

INPUT_TOKENS, OUTPUT_TOKENS = 512, 256
# vLLM 0.24 on an H100, 24 requests a second.
VLLM_MS = {"tpot p50": 14.2, "itl p99": 38.0, "ttft p99": 138.0}
OPTIONS = ("--load-format", "dummy", "--device", "cuda", "--max-total-tokens", "2048", "--max-sequences", "256",
           "--max-batch-tokens", "8192", "--max-queue", "4096", "--log-level", "warn")  # fmt: skip


def measure(url: str, rate: float, seconds: float, report: Report) -> None:
    """Requests at `rate` a second for `seconds`; figures are of all of them, ramp and tail included."""
    load = Load(url, round(rate * seconds), rate, INPUT_TOKENS, OUTPUT_TOKENS, seed=round(rate))
    traces, _ = uvloop.run(run(load))
    failed = [trace for trace in traces if not trace.answered]
    if failed:
        raise SystemExit(
            f"{len(failed)} of {load.requests} requests failed at {rate:g}/s: {failed[0].error or 'no tokens'}"
        )
    for metric, value in figures(traces).items():
        is_rate = metric == "output tokens"
        report.add(
            "serving", f"llama-3.1-8b bf16 {INPUT_TOKENS}/{OUTPUT_TOKENS}, {rate:g} req/s", value, metric=metric,
            unit="tok/s" if is_rate else "ms", better="higher" if is_rate else "lower",
            baselines={"vllm 0.24 on H100": VLLM_MS[metric]} if rate == 24 and metric in VLLM_MS else None,
        )  # fmt: skip


def figures(traces: list[Trace]) -> dict[str, float]:
    """Throughput in tokens a second; percentiles in ms of the first token, the mean gap and each gap."""
    span = max(trace.events[-1] for trace in traces) - min(trace.sent for trace in traces)
    times = {
        "ttft": [trace.first_s for trace in traces],
        "tpot": [trace.mean_gap_s for trace in traces],
        "itl": [gap for trace in traces for gap in trace.gaps_s()],
    }
    found = {"output tokens": sum(trace.tokens for trace in traces) / span}
    for name, values in times.items():
        for percent in (50, 99):
            found[f"{name} p{percent}"] = 1e3 * percentile(values, percent / 100)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[4, 8, 16, 24, 32], help="requests a second"
    )
    parser.add_argument("--seconds", type=float, default=20, help="for which each rate is offered")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    report = Report(device_name(), csrc_sha256())
    process, url = start_server(model_folder(), *OPTIONS)
    try:
        # Kernels that were not captured in graphs load on first use; a short burst touches all of them.
        uvloop.run(run(Load(url, 32, 64, INPUT_TOKENS, 16, seed=999)))
        for rate in args.rates:
            measure(url, rate, args.seconds, report)
    finally:
        process.terminate()
        process.wait()
        report.write(args.out / report.device / "serving.jsonl")
        print(report.table())


if __name__ == "__main__":
    main()
