"""Does anything grow? Mixed traffic on a server of its own, and what its processes hold before, during and after.

    python -m benchmarks.soak --requests 10000                        # a tiny random model, half of the clients abort
    python -m benchmarks.soak --minutes 10 --gpu --name gpu            # Llama 3.1 8B's shape, random weights, on a GPU

Options after `--` go to the server. Lengths are random, beginnings are shared (prefix hits), the cache is too small
for all clients (preemption). After a first part that warms up, and again at the end, the server is let go idle: then
pages, file descriptors and threads must be what they were, the memory of all processes together within 1 %, that
held on a GPU within 16 MiB, and a greedy canary must say the same, as it must all the while. The exit status is 1 if
something did not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.harness import ROOT, cpu_name, csrc_sha256, device_name
from benchmarks.soak_traffic import Mix, Tally, drive
from benchmarks.startup import model_folder

_WARM_UP = 0.25  # of requests or minutes
_SAMPLES = 12  # lines of the table
_IDLE_WITHIN_S = 60.0
_MOST_GROWTH = 0.01  # of memory
_MOST_DEVICE_GROWTH = 16 << 20  # bytes: torch takes blocks of 2 MiB, as steps of new sizes come
_FAILURES_SHOWN = 8
_CANARY = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 12}}
# Less than all clients together ask for: sequences are preempted.
_SMALL_CACHE = ("--max-total-tokens", "512", "--max-batch-total-tokens", "1024")
_ON_GPU = (
    "--device", "cuda", "--load-format", "dummy", "--max-total-tokens", "4096", "--max-batch-total-tokens", "12288",
    "--max-sequences", "64", "--max-queue", "512",
)  # fmt: skip
_GPU_MIX = Mix(
    clients=64, most_words=250, most_tokens=400
)  # of all clients some 80 000 tokens: 6 to 7 a word


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    fds: int
    threads: int
    megabytes: float  # of its own, in memory or swapped out; pages of files do not count

    @classmethod
    def by(cls, process: psutil.Process) -> Held:
        with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
            sizes = dict(line.split(":", 1) for line in status)
        kilobytes = sum(int(sizes[name].split()[0]) for name in ("RssAnon", "VmSwap"))
        return cls(process.num_fds(), process.num_threads(), round(kilobytes / 1024, 2))


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    seconds: float
    requests: int
    free_pages: int
    preemptions: int
    prefix_hit_tokens: int
    device_bytes: int  # held on a GPU
    held: Mapping[str, Held]  # by process
    canary: str


@dataclass
class Soak:
    """A server under load."""

    url: str
    process: psutil.Process
    mix: Mix
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def run(self, requests: int, minutes: float) -> tuple[Sample, Sample]:
        """Warm up, go idle, load, go idle; the server at both idle times. One of `requests` and `minutes` is 0."""
        for part in range(1, _SAMPLES + 1):
            share = _WARM_UP + (1 - _WARM_UP) * (part - 1) / (_SAMPLES - 1)
            asyncio.run(drive(self.url, self.mix, self.tally, self._limit(requests * share, minutes * share)))
            if part in (1, _SAMPLES):
                self._wait_idle()
            self.samples.append(self._sample())
            print(self._line(self.samples[-1]), flush=True)
        return self.samples[0], self.samples[-1]

    def _limit(self, requests: float, minutes: float) -> Callable[[], bool]:
        if minutes:
            return lambda: time.monotonic() - self.began_s >= 60 * minutes
        return lambda: self.tally.requests >= requests

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + _IDLE_WITHIN_S
        while (status := self._status())["running"] or status["waiting"]:
            if time.monotonic() > deadline:
                raise SystemExit(f"not idle within {_IDLE_WITHIN_S:g} s: {status}")
            time.sleep(0.2)
        time.sleep(1.5)  # two statuses later every page is back, and connections are closed

    def _status(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/info", timeout=30) as response:
            status: dict[str, int] = json.load(response)["engine"]
        return status

    def _sample(self) -> Sample:
        body = json.dumps(_CANARY).encode()
        request = urllib.request.Request(f"{self.url}/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            canary = json.load(response)["generated_text"]
        time.sleep(0.6)  # a status later, and with that connection closed
        held = {"front end": Held.by(self.process)}
        for child in self.process.children():
            held[child.cmdline()[-1].rsplit(".", 1)[-1]] = Held.by(child)
        status = self._status()
        return Sample(
            round(time.monotonic() - self.began_s, 1),
            self.tally.requests,
            status["free_pages"],
            status["preemptions"],
            status["prefix_hit_tokens"],
            status["device_bytes"],
            held,
            canary,
        )

    def _line(self, sample: Sample) -> str:
        outcomes = "".join(f"{self.tally.outcomes[name]:9}" for name in _OUTCOMES)
        held = "".join(
            f"{one.fds:7}{one.threads:5}{one.megabytes:9.1f}"
            for one in (sample.held["front end"], sample.held["engine"])
        )
        counts = (
            f"{sample.preemptions:9}{sample.prefix_hit_tokens:10}{sample.free_pages:7}"
            f"{sample.device_bytes / 2**20:9.0f}"
        )
        return f"{sample.seconds:7.0f}{sample.requests:9}{outcomes}{counts}{held}"


_OUTCOMES = ("answered", "aborted", "refused", "failed")
_HEAD = (
    f"{'seconds':>7}{'requests':>9}"
    + "".join(f"{name:>9}" for name in _OUTCOMES)
    + f"{'preempt':>9}{'hits':>10}"
    f"{'pages':>7}{'GPU MB':>9}" + f"{'fds':>7}{'thr':>5}{'front MB':>9}{'fds':>7}{'thr':>5}{'eng. MB':>9}"
)


def complaints(soak: Soak, before: Sample, after: Sample) -> list[str]:
    """What did not come back; nothing of a server that is steady."""
    found = [f"{count} × {what}" for what, count in soak.tally.failures.most_common(_FAILURES_SHOWN)]
    if len({sample.canary for sample in soak.samples}) > 1:
        found.append("the canary changed its mind")
    if after.free_pages != before.free_pages:
        found.append(f"{after.free_pages} pages are free, {before.free_pages} were")
    if after.device_bytes > before.device_bytes + _MOST_DEVICE_GROWTH:
        found.append(f"{after.device_bytes} bytes are held on the GPU, {before.device_bytes} were")
    if before.held.keys() != after.held.keys():
        found.append(f"processes: {', '.join(after.held)}; before: {', '.join(before.held)}")
    for name in before.held.keys() & after.held.keys():
        old, new = before.held[name], after.held[name]
        for what in ("fds", "threads"):
            if getattr(new, what) > getattr(old, what):
                found.append(f"the {name} has {getattr(new, what)} {what}, it had {getattr(old, what)}")
    old_mb, new_mb = (sum(one.megabytes for one in sample.held.values()) for sample in (before, after))
    if new_mb > old_mb * (1 + _MOST_GROWTH):
        found.append(f"all processes together have {new_mb:.1f} MB, they had {old_mb:.1f}")
    return found


@contextmanager
def server(model: Path, options: Sequence[str]) -> Iterator[tuple[psutil.Process, str]]:
    """A server on a free port until it is ready, and its address."""
    command = [sys.executable, "-m", "tgi_server.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen([*command, "--log-level", "error", *options], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if ready := re.search(rb"is ready on (http://\S+)", line):
                yield psutil.Process(process.pid), ready.group(1).decode()
                return
        raise SystemExit(f"the server ended with {process.wait()} before it was ready")
    finally:
        process.terminate()
        process.wait(timeout=60)


def soaked(
    model: Path, options: Sequence[str], mix: Mix, requests: int, minutes: float = 0.0
) -> tuple[Soak, list[str]]:
    """Run it, print the table; the soak, and what did not come back."""
    with server(model, options) as (process, url):
        print(_HEAD)
        soak = Soak(url, process, mix)
        found = complaints(soak, *soak.run(requests, minutes))
    return soak, found


def tiny_model() -> Path:
    """A random one, as the tests have it, whose answers end at their length."""
    from tests.faults.tiny_model import write_model  # noqa: PLC0415

    return write_model(Path(tempfile.mkdtemp()) / "tiny", eos_token_id=None)


def main() -> int:
    args = _arguments()
    chosen = _GPU_MIX if args.gpu else Mix()
    mix = replace(chosen, **{name: value for name in _MIX if (value := getattr(args, name)) is not None})
    options = args.server or (_ON_GPU if args.gpu else ("--device", "cpu", *_SMALL_CACHE))
    model = args.model or (model_folder() if args.gpu else tiny_model())
    soak, found = soaked(model, options, mix, args.requests, args.minutes)
    print("\n".join(found) if found else "steady: everything came back")
    if args.name:
        path = args.out / (device_name() if args.gpu else cpu_name()) / f"soak-{args.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "server": list(options), "mix": asdict(mix), "outcomes": soak.tally.outcomes,
            "tokens": soak.tally.tokens, "complaints": found, "csrc_sha256": csrc_sha256(),
            "samples": [asdict(sample) for sample in soak.samples],
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if found else 0


_MIX = ("clients", "most_words", "most_tokens", "aborting", "sampling")  # fields that have options


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of a number of requests")
    parser.add_argument(
        "--gpu", action="store_true", help="Llama 3.1 8B's shape on a GPU, more clients, longer texts"
    )
    parser.add_argument("--model", type=Path, help="folder; by default a random model")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--most-words", type=int, help="of a prompt")
    parser.add_argument("--most-tokens", type=int, help="of an answer")
    parser.add_argument("--aborting", type=float, help="share of requests")
    parser.add_argument("--sampling", type=float, help="share of requests; others are greedy")
    parser.add_argument("--name", help="write what was found to results/DEVICE/soak-NAME.json")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("server", nargs="*", help="options of the server, after --")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
