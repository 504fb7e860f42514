"""Load on a running server: open-loop arrivals, times to and between tokens, goodput.

    tgi-server serve --model-id models/SmolLM2-135M-Instruct --port 3000
    python -m benchmarks.serving --requests 64 --rate 4 --input-tokens 128 --output-tokens 64

Arrivals do not wait for answers (Poisson at --rate a second; `inf` sends all at once), so a slow server sees its
queue grow as in life. The client reads raw sockets and parses nothing but line starts while tokens come.
With --long-prompt one more request, of that many tokens, comes when all streams run; only the gaps between
tokens while it is read count then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.harness import ROOT, Report, cpu_name, csrc_sha256


@dataclass
class Trace:
    """One request, times in seconds on one clock."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def first_s(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def mean_gap_s(self) -> float:
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)

    def gaps_s(self, since: float = -math.inf, until: float = math.inf) -> list[float]:
        """Times between tokens, of those that came in [since, until]."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return [later - earlier for earlier, later in pairs if since <= earlier and later <= until]


@dataclass(frozen=True)
class Load:
    url: str
    requests: int
    rate: float  # a second
    input_tokens: int
    output_tokens: int
    long_prompt: int = 0  # tokens of one more request; 0: none
    seed: int = 0

    @property
    def case(self) -> str:
        arrivals = "at once" if math.isinf(self.rate) else f"at {self.rate:g}/s"
        streams = f"{self.requests} of {self.input_tokens}+{self.output_tokens} tokens {arrivals}"
        return streams if not self.long_prompt else f"{streams}, then a prompt of {self.long_prompt}"


@dataclass(frozen=True)
class Goals:
    """What makes a request good: time to its first token and mean time between its tokens."""

    first_s: float
    gap_s: float

    def met(self, trace: Trace) -> bool:
        return trace.first_s <= self.first_s and trace.mean_gap_s <= self.gap_s


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; NaN for none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def body(rng: random.Random, input_tokens: int, output_tokens: int) -> bytes:
    """A request whose prompt is random ids: of exactly that length, and sharing no prefix with another."""
    return json.dumps(
        {
            "prompt": [rng.randrange(1000, 5000) for _ in range(input_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()


async def ask(url: str, content: bytes) -> Trace:
    """Send one request and time the events of its stream."""
    address = urlsplit(url)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    trace = Trace(sent=time.perf_counter())
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
    writer.write(head.encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        trace.error = status.decode().strip() + " " + (await reader.read()).decode(errors="replace")[-200:]
    async for line in reader:
        if line.startswith(b'data: {"error"'):
            trace.error = line.decode()
        elif line.startswith(b"data: {"):
            trace.tokens.append(time.perf_counter())
    writer.close()
    return trace


async def run(load: Load) -> tuple[list[Trace], Trace | None]:
    """The traces of all streams, and that of the long prompt."""
    rng = random.Random(load.seed)
    bodies = [body(rng, load.input_tokens, load.output_tokens) for _ in range(load.requests)]
    tasks = []
    for content in bodies:
        tasks.append(asyncio.create_task(ask(load.url, content)))
        if not math.isinf(load.rate):
            await asyncio.sleep(rng.expovariate(load.rate))
    intruder = None
    if load.long_prompt:
        await _all_decode(load)
        intruder = await ask(load.url, body(rng, load.long_prompt, 2))
    return await asyncio.gather(*tasks), intruder


async def _all_decode(load: Load) -> None:
    """A request that comes last has its second token when all before it have their first."""
    await ask(load.url, body(random.Random(load.seed + 1), load.input_tokens, 4))


def summarise(load: Load, traces: list[Trace], intruder: Trace | None, goals: Goals, report: Report) -> None:
    """Throughput, percentiles, and goodput: requests a second that met both goals."""
    answered = [trace for trace in traces if not trace.error and len(trace.tokens) > 1]
    if not answered:
        raise SystemExit(f"no request was answered; the first error: {traces[0].error or 'no tokens'}")
    span = max(trace.tokens[-1] for trace in answered) - min(trace.sent for trace in answered)
    since, until = (intruder.sent, intruder.tokens[0]) if intruder else (-math.inf, math.inf)
    gaps = [gap for trace in answered for gap in trace.gaps_s(since, until)]
    if not gaps:
        raise SystemExit("no two tokens came while the long prompt was read; ask for more --output-tokens")

    def add(metric: str, value: float, unit: str, better: str = "lower") -> None:
        report.add("serving", load.case, value, metric=metric, unit=unit, better=better)

    add("output tokens", sum(len(trace.tokens) for trace in answered) / span, "tok/s", "higher")
    times = {
        "ttft": [trace.first_s for trace in answered],
        "tpot": [trace.mean_gap_s for trace in answered],
        "itl": gaps,
    }
    for name, values in times.items():
        for percent in (50, 90, 99):
            add(f"{name} p{percent}", 1000 * percentile(values, percent / 100), "ms")
    mean = sum(gaps) / len(gaps)
    add("itl mean", 1000 * mean, "ms")
    add("itl p99 / mean", percentile(gaps, 0.99) / mean, "ratio")
    add("goodput", sum(map(goals.met, answered)) / span, "req/s", "higher")
    add("failed", len(traces) - len(answered), "requests")
    if intruder:
        add("ttft of the long prompt", 1000 * intruder.first_s, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second; inf: all at once")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--ttft-goal-ms", type=float, default=2000)
    parser.add_argument("--tpot-goal-ms", type=float, default=200)
    parser.add_argument(
        "--device", default=cpu_name(), help="what the server computes on: a folder of results/"
    )
    parser.add_argument("--name", help="write the figures to results/DEVICE/serving-NAME.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    load = Load(args.url, args.requests, args.rate, args.input_tokens, args.output_tokens, args.long_prompt)
    goals = Goals(args.ttft_goal_ms / 1000, args.tpot_goal_ms / 1000)
    report = Report(args.device, csrc_sha256())
    summarise(load, *asyncio.run(run(load)), goals, report)
    if args.name:
        report.write(args.out / args.device / f"serving-{args.name}.jsonl")
    print(report.table())


if __name__ == "__main__":
    main()
