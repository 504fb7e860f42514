"""Runs every benchmark of this machine, one after the other, and the GPU's clocks beside them.

    python -m benchmarks.run_all [--only matmul decode ...] [--out DIR]

With a GPU: the kernels, decode, offline, serving, startup and DLPack; without: the CPU's. Each writes
results/<device>/<name>.jsonl with the date, the hash of csrc/ and the alternative of each case; clocks.jsonl says at
what clocks, power and temperature each ran. One that fails does not stop the others; the status is then 1.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch

from benchmarks.harness import ROOT, Report, csrc_sha256, device_name

_CLOCKS = {"clocks.sm": "MHz", "clocks.mem": "MHz", "power.draw": "W", "temperature.gpu": "°C"}
_CPU = ("benchmarks.cpu", "benchmarks.cpu_quant", "benchmarks.frontend")
_WHOLE_SERVERS = (
    "benchmarks.decode",
    "benchmarks.decode_quantised",
    "benchmarks.offline",
    "benchmarks.serving_gpu",
    "benchmarks.startup",
)


def modules() -> list[str]:
    """What there is to run on this machine, kernels first."""
    if not torch.cuda.is_available():
        return list(_CPU)
    kernels = sorted(path.stem for path in (ROOT / "benchmarks" / "kernels").glob("bench_*.py"))
    return [*(f"benchmarks.kernels.{name}" for name in kernels), *_WHOLE_SERVERS]


@contextmanager
def clocks(report: Report, case: str) -> Iterator[None]:
    """Sample the GPU's sensors twice a second while inside; medians, and the lowest SM clock, go to the report."""
    if not torch.cuda.is_available():
        yield
        return
    query = [
        "nvidia-smi",
        "--id=0",
        f"--query-gpu={','.join(_CLOCKS)}",
        "--format=csv,noheader,nounits",
        "-lms",
        "500",
    ]
    with TemporaryFile("w+") as file:
        sampler = subprocess.Popen(query, stdout=file)
        try:
            yield
        finally:
            sampler.terminate()
            sampler.wait()
        file.seek(0)
        rows = list(parse(file.read().splitlines()))
    for i, (name, unit) in enumerate(_CLOCKS.items()):
        values = [row[i] for row in rows]
        if values:
            report.add(
                "clocks", case, statistics.median(values), metric=f"{name} median", unit=unit, better="higher"
            )
    if rows:
        busy = [row[0] for row in rows]
        report.add("clocks", case, min(busy), metric="clocks.sm lowest", unit="MHz", better="higher")


def parse(lines: Sequence[str]) -> Iterator[tuple[float, ...]]:
    """The samples of nvidia-smi that are whole: the last line may be cut off, a sensor may say [N/A]."""
    for line in lines:
        try:
            values = tuple(float(cell) for cell in line.split(","))
        except ValueError:
            continue
        if len(values) == len(_CLOCKS):
            yield values


def run(module: str, out: Path) -> bool:
    """Whether the benchmark ended well; it prints its own table."""
    begin = time.monotonic()
    print(f"\n== {module}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, "--out", str(out)], cwd=ROOT, check=False)
    print(f"== {module}: status {done.returncode}, {time.monotonic() - begin:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="those whose module's name contains one of these"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    chosen = [module for module in modules() if not args.only or any(name in module for name in args.only)]
    if not chosen:
        raise SystemExit(f"none is called so; there are: {', '.join(modules())}")
    report = Report(device_name(), csrc_sha256())
    failed = []
    for module in chosen:
        with clocks(report, module.removeprefix("benchmarks.")):
            if not run(module, args.out):
                failed.append(module)
    if report.records:
        report.write(args.out / report.device / "clocks.jsonl")
        print(f"\n{report.table()}")
    print(
        f"\n{len(chosen) - len(failed)} of {len(chosen)} ran"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
