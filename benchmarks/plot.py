"""Draws the README's two pictures from benchmarks/results: a roofline, and latency over throughput.

    pip install '.[bench]'
    python -m benchmarks.plot [--device h200] [--out docs/img]

Every point is a line of a results file; nothing is drawn that was not measured.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.decode import FLOPS_PER_TOKEN, KV_TOKEN_BYTES, MEAN_CONTEXT, WEIGHT_BYTES
from benchmarks.harness import ROOT

Record = dict[str, Any]

OURS, THEIRS, ROOF = "#0b6e4f", "#b5651d", "#8a8a8a"
MARKERS = {"matmul": "D", "attention, decode": "s", "attention, prefill": "^", "decode step": "o"}
# The figures whose work and bytes follow from their case: how it is written, and the metric that counts.
_PLACED = {
    "matmul": (re.compile(r"bf16 M=(\d+) (\d+)x(\d+)"), "time in a chain"),
    "attention_decode": (re.compile(r"(bf16|fp8) 32/8/128 page16 (\d+)x(\d+)"), "time"),
    "attention_prefill": (re.compile(r"bf16 32/8/128 page16 causal (\d+)x(\d+)"), "rate"),
    "decode_step": (re.compile(r"llama-3.1-8b bf16 B=(\d+)"), "time"),
}


@dataclass(frozen=True)
class Point:
    """One kernel or step: work per byte it must move, and the rate it was done at."""

    family: str
    label: str
    flops_per_byte: float
    tflops: float


def records_of(folder: Path) -> list[Record]:
    """All figures of one device."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{folder} holds no results; run python -m benchmarks.run_all there first")
    return [json.loads(line) for line in lines]


def points(records: Sequence[Record]) -> Iterator[Point]:
    """What can be placed on a roofline."""
    for record in records:
        point = _point(record)
        if point is not None:
            yield point


def _point(record: Record) -> Point | None:
    bench, case, value = record["bench"], record["case"], record["value"]
    pattern, metric = _PLACED.get(bench, (None, ""))
    found = pattern.fullmatch(case) if pattern and record["metric"] == metric else None
    if found is None:
        return None
    sizes = [int(group) for group in found.groups() if group.isdigit()]
    if bench == "matmul":
        m, k, n = sizes
        return _timed("matmul", f"M={m}", 2 * m * k * n, 2 * (k * n + m * k + m * n), value * 1e-6)
    if bench == "attention_decode":
        tokens, item = sizes[0] * sizes[1], 2 if found[1] == "bf16" else 1
        label = f"{found[1]} {sizes[0]}×{sizes[1]}"
        return _timed("attention, decode", label, 4 * tokens * 4096, 2 * tokens * 1024 * item, value * 1e-6)
    if bench == "attention_prefill":
        seqs, tokens = sizes
        flops, moved = 2 * seqs * tokens**2 * 4096, seqs * tokens * (2 * 4096 + 2 * 1024) * 2
        return Point("attention, prefill", f"{seqs}×{tokens}", flops / moved, value)
    rows = sizes[0]
    flops = rows * (FLOPS_PER_TOKEN + 2 * 4096 * 128256 + 4 * MEAN_CONTEXT * 4096 * 32)
    moved = WEIGHT_BYTES + rows * MEAN_CONTEXT * KV_TOKEN_BYTES
    return _timed("decode step", f"B={rows}", flops, moved, value * 1e-3)


def _timed(family: str, label: str, flops: float, moved_bytes: float, seconds: float) -> Point:
    return Point(family, label, flops / moved_bytes, flops / seconds / 1e12)


def roofline(records: Sequence[Record], device: str) -> plt.Figure:
    """Rate over work per byte, under the roofs of memory and arithmetic."""
    read_tb, matmul_tflops = _roof(records, "read") / 1e3, _roof(records, "bf16 8192³")
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities = [0.7, matmul_tflops / read_tb, 8000]
    axes.plot(
        intensities,
        [min(x * read_tb, matmul_tflops) for x in intensities],
        color=ROOF,
        linewidth=1.2,
        zorder=1,
    )
    axes.text(1.9, 3.2 * read_tb, f"{read_tb:.1f} TB/s", color=ROOF, rotation=40, fontsize=9)
    axes.text(8000, matmul_tflops * 1.08, f"{matmul_tflops:.0f} TFLOP/s", color=ROOF, ha="right", fontsize=9)
    found = list(points(records))
    colours = dict(zip(MARKERS, mpl.colormaps["viridis"]([0.05, 0.35, 0.6, 0.85]), strict=True))
    for family, marker in MARKERS.items():
        own = [point for point in found if point.family == family]
        size, above = (70, 3) if family == "decode step" else (30, 2)
        axes.scatter(
            [point.flops_per_byte for point in own], [point.tflops for point in own], marker=marker, s=size,
            color=colours[family], label=family, edgecolors="white", linewidths=0.5, zorder=above,
        )  # fmt: skip
        if family in ("decode step", "attention, prefill"):
            for point in own:
                axes.annotate(
                    point.label, (point.flops_per_byte, point.tflops), (6, -10), textcoords="offset points",
                    fontsize=8,
                )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte that has to be moved", ylabel="TFLOP/s",
        title=f"Kernels and decode steps on one {device.upper()}, bf16",
    )  # fmt: skip
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(frameon=False, loc="lower right")
    return figure


def _roof(records: Sequence[Record], case: str) -> float:
    """The best that any run measured: each file has its own, a few percent apart."""
    return float(
        max(record["value"] for record in records if record["bench"] == "roof" and record["case"] == case)
    )


def latency(records: Sequence[Record], device: str) -> plt.Figure:
    """Time between two tokens of a stream over tokens a second of all streams."""
    figure, axes = plt.subplots(figsize=(8, 5))
    steps = []
    for record in records:
        if record["bench"] == "decode_step" and (found := re.search(r"bf16 B=(\d+)$", record["case"])):
            theirs = {name: value for name, value in record["baselines"].items() if name.startswith("vllm")}
            steps.append((int(found[1]), record["value"], theirs))
    steps.sort(key=lambda step: step[0])
    _curve(axes, [(rows, ms) for rows, ms, _ in steps], OURS, f"ours, {device.upper()}, in process", "o-")
    for name in {name for _, _, theirs in steps for name in theirs}:
        _curve(
            axes, [(rows, theirs[name]) for rows, _, theirs in steps if name in theirs], THEIRS, name, "s--"
        )
    served = _served(records)
    if served:
        rates, ours = zip(*served, strict=True)
        axes.plot(*zip(*ours, strict=True), "^-", color="#1f4e9c", label=f"ours, {device.upper()}, over HTTP")
        for rate, point in zip(rates, ours, strict=True):
            axes.annotate(f"{rate:g}/s", point, (6, -10), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="tokens a second, all streams", ylabel="ms between two tokens of a stream", ylim=(0, None),
        xlim=(0, None), title="Llama 3.1 8B's shape, bf16, 1 to 256 streams",
    )  # fmt: skip
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _curve(axes: plt.Axes, steps: Sequence[tuple[int, float]], colour: str, label: str, style: str) -> None:
    """A point for each batch size."""
    axes.plot(
        [rows / ms * 1e3 for rows, ms in steps], [ms for _, ms in steps], style, color=colour, label=label
    )
    for rows, ms in steps:
        axes.annotate(f"{rows}", (rows / ms * 1e3, ms), (5, 5), textcoords="offset points", fontsize=8)


def _served(records: Sequence[Record]) -> list[tuple[float, tuple[float, float]]]:
    """Arrivals a second, and (tokens a second, TPOT p50) of each rate."""
    by_rate: dict[float, dict[str, float]] = {}
    for record in records:
        found = re.fullmatch(r"llama-3.1-8b bf16 512/256, ([\d.]+) req/s", record["case"])
        if record["bench"] == "serving" and found:
            by_rate.setdefault(float(found[1]), {})[record["metric"]] = record["value"]
    return [(rate, (got["output tokens"], got["tpot p50"])) for rate, got in sorted(by_rate.items())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h200", help="folder of benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    args = parser.parse_args()
    records = records_of(ROOT / "benchmarks" / "results" / args.device)
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("roofline", roofline), ("latency", latency)):
        file = args.out / f"{name}.png"
        draw(records, args.device).savefig(file, dpi=130, bbox_inches="tight", metadata={"Software": None})
        print(file)


if __name__ == "__main__":
    main()
