"""Load on a running server: open-loop arrivals, times to and between tokens, goodput.

    python -m benchmarks.serving --url http://127.0.0.1:3000 --requests 64 --rate 4 --output-tokens 64

Arrivals do not wait for answers (Poisson at --rate a second; `inf` sends all at once), so a slow server sees its
queue grow as in life. The client reads raw sockets and parses nothing but line starts while tokens come.
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

from tokenizers import Tokenizer

from benchmarks.harness import Result, write_results


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
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    url: str
    requests: int
    rate: float
    input_tokens: int
    output_tokens: int
    seed: int = 0


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; NaN for none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def prompts(load: Load, tokenizer: Tokenizer) -> list[str]:
    """Random texts of exactly `input_tokens` tokens each, no two with a common first page."""
    rng = random.Random(load.seed)
    words = [tokenizer.decode([i]) for i in range(1000, 5000)]
    plain = [word for word in words if word.isascii() and word.strip().isalpha() and word.startswith(" ")]
    texts = []
    while len(texts) < load.requests:
        text = "".join(rng.choices(plain, k=load.input_tokens))
        if len(tokenizer.encode(text).ids) == load.input_tokens:
            texts.append(text)
    return texts


async def ask(load: Load, prompt: str, start: float) -> Trace:
    """Send one request at `start` and time the tokens of its stream."""
    await asyncio.sleep(start - time.perf_counter())
    trace = Trace(sent=time.perf_counter())
    address = urlsplit(load.url)
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        trace.error = status.decode().strip() + " " + (await reader.read()).decode(errors="replace")[-200:]
    async for line in reader:
        if line.startswith(b'data: {"error"'):
            trace.error = line.decode()
        elif line.startswith(b"data: {") and b'"text":""' not in line:
            trace.tokens.append(time.perf_counter())
    writer.close()
    return trace


async def run(load: Load, texts: list[str]) -> list[Trace]:
    rng = random.Random(load.seed + 1)
    at = time.perf_counter() + 0.1
    tasks = []
    for text in texts:
        tasks.append(asyncio.create_task(ask(load, text, at)))
        at += 0.0 if math.isinf(load.rate) else rng.expovariate(load.rate)
    return await asyncio.gather(*tasks)


def summarise(load: Load, traces: list[Trace], ttft_goal_s: float, tpot_goal_s: float) -> list[Result]:
    """Throughput, percentiles, and goodput: requests a second that met both goals."""
    answered = [trace for trace in traces if not trace.error and len(trace.tokens) > 1]
    if not answered:
        raise SystemExit(f"no request was answered; the first error: {traces[0].error or 'no tokens'}")
    span = max(trace.tokens[-1] for trace in answered) - min(trace.sent for trace in answered)
    firsts = [trace.first_s for trace in answered]
    per_token = [sum(trace.gaps_s) / len(trace.gaps_s) for trace in answered]
    gaps = [gap for trace in answered for gap in trace.gaps_s]
    met = sum(
        1
        for first, each in zip(firsts, per_token, strict=True)
        if first <= ttft_goal_s and each <= tpot_goal_s
    )
    case = f"{load.requests}x{load.input_tokens}/{load.output_tokens} at {load.rate:g}/s"

    def row(metric: str, value: float, unit: str, better: str = "lower") -> Result:
        return Result("serving", case, metric, value, unit, better)

    rows = [row("output_tokens", sum(len(t.tokens) for t in answered) / span, "tok/s", "higher")]
    for name, values in (("ttft", firsts), ("tpot", per_token), ("itl", gaps)):
        rows += [row(f"{name}_p{p}", 1000 * percentile(values, p / 100), "ms") for p in (50, 90, 99)]
    rows += [row("itl_mean", 1000 * sum(gaps) / len(gaps), "ms")]
    rows += [
        row("goodput", met / span, "req/s", "higher"),
        row("failed", len(traces) - len(answered), "requests"),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct/tokenizer.json"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second; inf: all at once")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--ttft-goal-ms", type=float, default=2000)
    parser.add_argument("--tpot-goal-ms", type=float, default=200)
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    args = parser.parse_args()
    load = Load(args.url, args.requests, args.rate, args.input_tokens, args.output_tokens)
    texts = prompts(load, Tokenizer.from_file(str(args.tokenizer)))
    traces = asyncio.run(run(load, texts))
    write_results(summarise(load, traces, args.ttft_goal_ms / 1000, args.tpot_goal_ms / 1000), args.output)


if __name__ == "__main__":
    main()
