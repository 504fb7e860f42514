"""Runs tests on a GPU and keeps what came of them as one line of benchmarks/results/DEVICE/gpu_tests.jsonl.

    python -m tests.gpu_report kernels tests/kernels -m gpu -n 6
    python -m tests.gpu_report "racecheck, plain loads" --under racecheck tests/kernels/test_small_ops_gpu.py -m gpu

A line of the same name is replaced. Of what the library was built (TGI_CUDA_ARCHS, TGI_STRESS) the name says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness import ROOT, csrc_sha256, device_name

_SANITIZER = "compute-sanitizer"
_ALL = ("--error-exitcode", "9", "--target-processes", "all")
# Of other people's kernels nothing is asked, where the tool can do without what they write.
_TOOLS = {
    "memcheck": _ALL,
    "racecheck": (*_ALL, "--kernel-name", "kns=3tgi"),
    "initcheck": _ALL,
    "synccheck": _ALL,
}


def run(arguments: list[str], tool: str | None) -> dict[str, object]:
    """Runs pytest, under a tool of the sanitizer or alone; how many tests ended how, and the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        under = [_SANITIZER, "--tool", tool, *_TOOLS[tool]] if tool else []
        pytest = ["-m", "pytest", "-q", "--tb=short", "-rf", "-p", "no:cacheprovider", f"--junitxml={xml}"]
        code = subprocess.run([*under, sys.executable, *pytest, *arguments], cwd=ROOT, check=False).returncode
        if not xml.exists():
            raise SystemExit(f"pytest ended with {code} and without a report: nothing is recorded")
        suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    return {
        "passed": count["tests"] - count["failures"] - count["errors"] - count["skipped"],
        "failed": count["failures"] + count["errors"],
        "skipped": count["skipped"],
        "exit_code": code,
    }


def keep(line: dict[str, object], path: Path) -> None:
    """Adds the line to a file of JSON lines, in place of one of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [text for text in old if json.loads(text)["name"] != line["name"]]
    path.write_text("\n".join([*others, json.dumps(line)]) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the line")
    parser.add_argument("--under", choices=_TOOLS, help=f"a tool of {_SANITIZER}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args, arguments = parser.parse_known_args()
    began_s = time.monotonic()
    found = run(arguments, args.under)
    line = {
        "name": args.name,
        "under": args.under,
        "tests": shlex.join(arguments),
        **found,
        "seconds": round(time.monotonic() - began_s),
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "csrc_sha256": csrc_sha256(),
    }
    keep(line, args.out / device_name() / "gpu_tests.jsonl")
    print(json.dumps(line))
    return int(str(found["exit_code"]))


if __name__ == "__main__":
    sys.exit(main())
