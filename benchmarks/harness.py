"""Times kernels and CPU code beside the machine's measured roofs, and writes one JSON line per figure.

GPU figures are medians of CUDA graph replays. Each launch of a graph has buffers of its own, and the L2 cache
is swept before every replay, so inputs come from memory. `time_isolated` keeps launches apart, as among
strangers; `time_chain` lets them follow each other, as in a decode step, where dependent launches may overlap.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from tgi_kernels.cpu import isa, num_threads

ROOT = Path(__file__).resolve().parent.parent
Launch = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: median, 10th and 90th percentile of `samples` measurements."""

    median_s: float
    low_s: float
    high_s: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[last // 10], ordered[last - last // 10], len(ordered))


@dataclass(frozen=True)
class Roofs:
    """What this machine can do, measured in this run.

    copy and read: bytes/s of a device copy (read + write) and of a pure read. matmul: flop/s of an 8192³ bf16
    product sustained for 100 ms.
    """

    copy: float
    read: float
    matmul: float


@dataclass(frozen=True)
class Record:
    """One figure. `better` is "lower" or "higher"; `roof_pct` is how near `value` comes to its roof."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str
    better: str
    roof_pct: float | None
    baselines: Mapping[str, float]
    device: str
    date: str
    csrc_sha256: str


@dataclass
class Report:
    """Collects records; the table is for people, the JSON lines for `plot.py` and the next run."""

    device: str
    csrc_sha256: str
    records: list[Record] = field(default_factory=list)

    def add(
        self,
        bench: str,
        case: str,
        value: float,
        *,
        metric: str = "time",
        unit: str = "us",
        better: str = "lower",
        roof: float | None = None,
        baselines: Mapping[str, float] | None = None,
    ) -> None:
        """`roof` is in `unit`: the least time, or the highest rate, that the measured roofs allow."""
        share = None if roof is None else 100 * (roof / value if better == "lower" else value / roof)
        self.records.append(
            Record(
                bench=bench,
                case=case,
                metric=metric,
                value=round(value, 4),
                unit=unit,
                better=better,
                roof_pct=None if share is None else round(share, 1),
                baselines={name: round(other, 4) for name, other in (baselines or {}).items()},
                device=self.device,
                date=datetime.now(timezone.utc).date().isoformat(),
                csrc_sha256=self.csrc_sha256,
            )
        )

    def table(self) -> str:
        """A line per record, widths fitted."""
        lines = []
        for r in self.records:
            roof = "" if r.roof_pct is None else f"{r.roof_pct:5.1f} %"
            others = "  ".join(f"{name} {value:.6g}" for name, value in r.baselines.items())
            lines.append((r.bench, r.case, r.metric, f"{r.value:.6g} {r.unit}", roof, others))
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(5)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line[:5], widths, strict=True)), line[5]])
            for line in lines
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in self.records), encoding="utf-8")


def csrc_sha256() -> str:
    """Hash over the files of csrc/ in sorted order: which kernels a figure is of."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def device_name() -> str:
    """A short name for results/<device>/, such as h200; the processor's architecture without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    return f"cpu-{platform.machine()}"


def cpu_name() -> str:
    """The folder of results/ for CPU figures: the kernels' instruction set and the threads that compute."""
    return f"cpu-{isa()}-{num_threads()}core"


def copies_for(bytes_each: int) -> int:
    """How many sets of buffers to rotate: three times the L2 cache, but at least 8 and at most 32 sets."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(32, max(8, math.ceil(3 * l2_bytes / bytes_each)))


def time_isolated(launches: Sequence[Launch], samples: int = 30) -> Timing:
    """Seconds per launch, each kept apart by a one-element kernel whose own time is subtracted."""
    scratch = torch.zeros(1, device="cuda")
    separate = [lambda: scratch.add_(1)] * len(launches)
    both = [step for pair in zip(separate, launches, strict=True) for step in pair]
    gaps = _replay(separate, samples)
    total = _replay(both, samples)
    gap = statistics.median(gaps)
    return Timing.of([max(seconds - gap, 0.0) / len(launches) for seconds in total])


def time_chain(launches: Sequence[Launch], samples: int = 30) -> Timing:
    """Seconds per launch of launches that follow each other in one stream."""
    return Timing.of([seconds / len(launches) for seconds in _replay(launches, samples)])


def time_sustained(launch: Launch, seconds: float = 0.1) -> Timing:
    """Seconds per launch, back to back for at least `seconds`: what power limits leave of a burst's speed."""
    once = _between_events(lambda: [launch() for _ in range(3)]) / 3
    count = max(3, math.ceil(seconds / once))
    return Timing.of([_between_events(lambda: [launch() for _ in range(count)]) / count for _ in range(3)])


def time_cpu(call: Launch, samples: int = 30, least_s: float = 0.001) -> Timing:
    """Seconds per call on the CPU; each sample repeats the call for at least `least_s`."""
    call()
    begin = time.perf_counter()
    call()
    repeats = max(1, math.ceil(least_s / max(time.perf_counter() - begin, 1e-9)))
    taken = []
    for _ in range(samples):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        taken.append((time.perf_counter() - begin) / repeats)
    return Timing.of(taken)


def measure_roofs() -> Roofs:
    """The three ceilings of this GPU, on random data."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    wide = source.view(torch.int64)
    copied = time_sustained(lambda: target.copy_(source), 0.05).median_s
    read = time_sustained(lambda: torch.amax(wide), 0.05).median_s
    a, b = (source[: 8192 * 8192 * (i + 1)][-(8192 * 8192) :].view(8192, 8192) for i in range(2))
    product = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda")
    multiplied = time_sustained(lambda: torch.mm(a, b, out=product)).median_s
    return Roofs(2 * source.nbytes / copied, source.nbytes / read, 2 * 8192**3 / multiplied)


def main(bench: Callable[[Report, Roofs], None]) -> None:
    """Runs one benchmark file: the roofs, the figures, results/<device>/<bench>.jsonl, and the table last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out: Path = parser.parse_args().out
    report = Report(device_name(), csrc_sha256())
    roofs = measure_roofs()
    report.add("roof", "device copy", roofs.copy / 1e9, metric="rate", unit="GB/s", better="higher")
    report.add("roof", "read", roofs.read / 1e9, metric="rate", unit="GB/s", better="higher")
    report.add("roof", "bf16 8192³", roofs.matmul / 1e12, metric="rate", unit="TFLOP/s", better="higher")
    bench(report, roofs)
    name = Path(bench.__code__.co_filename).stem.removeprefix("bench_")
    report.write(out / report.device / f"{name}.jsonl")
    print(report.table())


def _between_events(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _replay(launches: Sequence[Launch], samples: int) -> list[float]:
    """Seconds of each of `samples` replays of a graph of the launches, the L2 cache swept before each."""
    for launch in launches[:2]:  # loads modules and picks algorithms outside the capture
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    sweep = _sweeper()
    taken = []
    for _ in range(samples + 3):
        torch.amax(sweep)  # a read: a write would leave dirty lines for the timed kernels to evict
        taken.append(_between_events(graph.replay))
    return taken[3:]


def _sweeper() -> Tensor:
    return torch.zeros(
        3 * torch.cuda.get_device_properties(0).L2_cache_size // 8, dtype=torch.int64, device="cuda"
    )
