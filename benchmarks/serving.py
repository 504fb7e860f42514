"""Load on a running server: open-loop arrivals, times to and between tokens, goodput.

    tgi-server serve --model-id models/SmolLM2-135M-Instruct --port 3000
    python -m benchmarks.serving --requests 64 --rate 4 --input-tokens 128 --output-tokens 64

Arrivals do not wait for answers (Poisson at --rate a second; `inf` sends all at once), so a slow server sees its
queue grow as in life. The client reads raw sockets and parses nothing but line starts while tokens come; what it costs
stands in the last line, in per cent of one core. An event may bring two tokens (of one letter in several bytes): gaps
are those between events, tokens are counted as the server's `usage` says at the end.
With --long-prompt one more request, of that many tokens, comes when all streams run; only the gaps between
tokens while it is read count then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.harness import ROOT, Report, cpu_name, csrc_sha256

_EVENT: Final = b"\ndata: {"
_FAILURE: Final = b'\ndata: {"error"'
_USAGE: Final = re.compile(rb'"completion_tokens":\s*(\d+)')
_USAGE_BYTES: Final = 512  # of a stream's end, among which the usage stands


@dataclass
class Trace:
    """One request, times in seconds on one clock."""

    sent: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0  # those of the answer, as its usage says
    error: str = ""

    @property
    def answered(self) -> bool:
        return not self.error and self.tokens > 1 and len(self.events) > 1

    @property
    def first_s(self) -> float:
        return self.events[0] - self.sent

    @property
    def mean_gap_s(self) -> float:
        return (self.events[-1] - self.events[0]) / (self.tokens - 1)

    def gaps_s(self, since: float = -math.inf, until: float = math.inf) -> list[float]:
        """Times between events, of those that came in [since, until]."""
        pairs = zip(self.events, self.events[1:], strict=False)
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
            "stream_options": {"include_usage": True},
        }
    ).encode()


class Stream(asyncio.Protocol):
    """Sends one request and times the events of its answer, of which it parses nothing but the beginnings.

    A token costs the client some microseconds, so that one process can watch tens of thousands a second.
    """

    def __init__(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self.trace = Trace(sent=time.perf_counter())
        self._request = request
        self._ended = ended
        self._tail = b""  # what may be the beginning of an event
        self._end = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._tail:
            status, _, _ = data.partition(b"\r\n")
            if b" 200 " not in status:
                self.trace.error = data.decode(errors="replace")[-400:]
        data = self._tail + data
        if _FAILURE in data:
            self.trace.error = data[data.index(_FAILURE) :].decode(errors="replace")[:400]
        self.trace.events += [now] * data.count(_EVENT)
        self._tail = data[1 - len(_EVENT) :]
        self._end = (self._end + data)[-_USAGE_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        if usage := _USAGE.search(self._end):
            self.trace.tokens = int(usage[1])
            self.trace.events.pop()  # the usage's own
        if exc is not None:
            self.trace.error = str(exc)
        if not self._ended.done():
            self._ended.set_result(None)


async def ask(url: str, content: bytes) -> Trace:
    """Send one request and time the events of its stream."""
    address, loop = urlsplit(url), asyncio.get_running_loop()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    ended: asyncio.Future[None] = loop.create_future()
    stream = Stream(head.encode() + content, ended)
    await loop.create_connection(lambda: stream, str(address.hostname), address.port or 80)
    await ended
    return stream.trace


@dataclass(frozen=True)
class Run:
    """What was seen of a load."""

    load: Load
    traces: list[Trace]
    intruder: Trace | None  # of the long prompt
    client_share: float  # of one core, taken by this process while it ran

    @property
    def answered(self) -> list[Trace]:
        """The streams that came to their end. Raises SystemExit if there are none."""
        good = [trace for trace in self.traces if trace.answered]
        if not good:
            raise SystemExit(
                f"no request was answered; the first error: {self.traces[0].error or 'no tokens'}"
            )
        for trace in good:
            if trace.tokens != self.load.output_tokens:
                raise SystemExit(f"a stream had {trace.tokens} tokens of {self.load.output_tokens}")
        return good

    @property
    def output_rate(self) -> float:
        """Tokens a second, from the first request sent to the last token."""
        good = self.answered
        return sum(trace.tokens for trace in good) / self._span_s

    @property
    def _span_s(self) -> float:
        good = self.answered
        return max(trace.events[-1] for trace in good) - min(trace.sent for trace in good)

    def gaps_s(self) -> list[float]:
        """Times between tokens; with a long prompt, of those that came while it was read."""
        intruder = self.intruder
        if intruder and not intruder.events:
            raise SystemExit(f"the long prompt was not answered: {intruder.error}")
        since, until = (intruder.sent, intruder.events[0]) if intruder else (-math.inf, math.inf)
        gaps = [gap for trace in self.answered for gap in trace.gaps_s(since, until)]
        if not gaps:
            raise SystemExit(
                "no two tokens came while the long prompt was read; ask for more --output-tokens"
            )
        return gaps

    def goodput(self, goals: Goals) -> float:
        """Requests a second that met the goals."""
        return sum(map(goals.met, self.answered)) / self._span_s


def measure(load: Load) -> Run:
    """Put the load on the server and watch."""
    began_s, spent_s = time.perf_counter(), time.process_time()
    traces, intruder = uvloop.run(run(load))
    share = (time.process_time() - spent_s) / (time.perf_counter() - began_s)
    return Run(load, traces, intruder, share)


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


def summarise(run: Run, goals: Goals, report: Report) -> None:
    """Throughput, percentiles, and goodput: requests a second that met both goals."""
    answered, gaps = run.answered, run.gaps_s()

    def add(metric: str, value: float, unit: str, better: str = "lower") -> None:
        report.add("serving", run.load.case, value, metric=metric, unit=unit, better=better)

    add("output tokens", run.output_rate, "tok/s", "higher")
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
    add("goodput", run.goodput(goals), "req/s", "higher")
    add("failed", len(run.traces) - len(answered), "requests")
    if run.intruder:
        add("ttft of the long prompt", 1000 * run.intruder.first_s, "ms")
    add("client", 100 * run.client_share, "% of a core")


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
    summarise(measure(load), goals, report)
    if args.name:
        report.write(args.out / args.device / f"serving-{args.name}.jsonl")
    print(report.table())


if __name__ == "__main__":
    main()
