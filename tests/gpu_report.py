"""Runs tests on a GPU and keeps what came of them in benchmarks/results/DEVICE/gpu_tests.json.

    python -m tests.gpu_report kernels tests/kernels -m gpu -n 6
    python -m tests.gpu_report "racecheck, plain loads" --under racecheck tests/kernels/test_small_ops_gpu.py -m gpu

What has the same name is replaced. Of what the library was built (TGI_CUDA_ARCHS, TGI_STRESS) the name says.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.harness import ROOT, csrc_sha256, device_name

_MOST_NAMED = 20
_SANITIZER = "compute-sanitizer"
_ALL = ("--error-exitcode", "9", "--target-processes", "all")
# Of other people's kernels nothing is asked, where the tool can do without what they write.
_TOOLS = {
    "memcheck": _ALL,
    "racecheck": (*_ALL, "--kernel-name", "kns=3tgi"),
    "initcheck": _ALL,
    "synccheck": _ALL,
}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin of that pytest: a run that is cut off has said what failed."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})", flush=True)


def run(arguments: list[str], tool: str | None) -> dict[str, object]:
    """Runs pytest, under a tool of the sanitizer or alone; how many tests ended how, and the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        under = [_SANITIZER, "--tool", tool, *_TOOLS[tool]] if tool else []
        options = [
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.gpu_report",
            f"--junitxml={xml}",
        ]
        command = [*under, sys.executable, "-m", "pytest", *options, *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not xml.exists():
            raise SystemExit(f"pytest ended with {code} and without a report: nothing is recorded")
        suite = next(ElementTree.parse(xml).getroot().iter("testsuite"))
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SystemExit("no test was selected: nothing is recorded")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    return {
        "passed": count["tests"] - count["failures"] - count["errors"] - count["skipped"],
        "failed": count["failures"] + count["errors"],
        "skipped": count["skipped"],
        "exit_code": code,
        "failures": failed[:_MOST_NAMED],
    }


def keep(run: dict[str, object], path: Path) -> None:
    """Adds it to a list in a file, in place of one of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    others = [one for one in old if one["name"] != run["name"]]
    path.write_text(json.dumps([*others, run], indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the run")
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
    keep(line, args.out / device_name() / "gpu_tests.json")
    print(json.dumps(line))
    return int(str(found["exit_code"]))


if __name__ == "__main__":
    sys.exit(main())
