"""The front end alone on one core: requests/s, and streamed tokens/s, with an engine that costs nothing.

The engine is a stub in another process that speaks over the real channel; it and the clients share the other
cores. Two figures each: what was served in a second, and in a second of the front end's own processor time,
which does not depend on who else uses the machine.

python -m benchmarks.frontend
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import psutil
import uvloop

from benchmarks.harness import ROOT, Report, csrc_sha256, device_name

PROMPT = "The quick brown fox jumps over the lazy dog. " * 5  # 50 tokens
CONNECTIONS = 64
REQUESTS = 6000
STREAMS, STREAM_TOKENS, ROUNDS = 64, 256, 6


class Client(asyncio.Protocol):
    """Sends a request again and again; `ended` says whether an answer is complete."""

    def __init__(
        self, request: bytes, times: int, done: asyncio.Semaphore, ended: Callable[[bytes], bool]
    ) -> None:
        self._request = request
        self._left = times
        self._done = done
        self._ended = ended
        self._seen = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if not self._ended(bytes(self._seen)):
            self._seen = self._seen[-200:] if len(self._seen) > 4096 else self._seen
            return
        assert b"error" not in self._seen[:2000], self._seen[:500]
        self._seen.clear()
        self._left -= 1
        if self._left:
            self._transport.write(self._request)
        else:
            self._transport.close()
            self._done.release()


async def load(
    port: int, connections: int, times: int, request: bytes, ended: Callable[[bytes], bool]
) -> None:
    """Wait until every connection has had `times` answers."""
    loop, done = asyncio.get_running_loop(), asyncio.Semaphore(0)
    for _ in range(connections):
        await loop.create_connection(lambda: Client(request, times, done, ended), "127.0.0.1", port)
    for _ in range(connections):
        await done.acquire()


def post(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@contextlib.contextmanager
def running() -> Iterator[tuple[psutil.Process, int]]:
    """Front end on the first core, stub on the others; the front end's process and port."""
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "benchmarks.frontend_roles"]
    stub = subprocess.Popen([*command, "engine"], stdin=theirs.fileno(), cwd=ROOT)
    front = subprocess.Popen(
        [*command, "front"], stdin=ours.fileno(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    ours.close()
    theirs.close()
    psutil.Process(front.pid).cpu_affinity(cores[:1])
    os.sched_setaffinity(0, cores[1:] or cores)
    psutil.Process(stub.pid).cpu_affinity(cores[1:] or cores)
    try:
        assert front.stdout is not None
        yield psutil.Process(front.pid), int(front.stdout.readline())
    finally:
        front.kill()
        front.wait()
        stub.wait()


def measure(
    front: psutil.Process,
    port: int,
    connections: int,
    times: int,
    request: bytes,
    ended: Callable[[bytes], bool],
) -> tuple[float, float]:
    """Seconds, and seconds of the front end's processor time."""
    uvloop.run(load(port, connections, 2, request, ended))
    used, began = sum(front.cpu_times()[:2]), time.perf_counter()
    uvloop.run(load(port, connections, times, request, ended))
    return time.perf_counter() - began, sum(front.cpu_times()[:2]) - used


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out: Path = parser.parse_args().out
    report = Report(device_name(), csrc_sha256())

    def add(case: str, count: int, taken: tuple[float, float], unit: str, goals: dict[str, float]) -> None:
        report.add(
            "frontend", case, count / taken[0], metric="rate", unit=unit, better="higher", baselines=goals
        )
        report.add(
            "frontend",
            case,
            count / taken[1],
            metric="rate of one core",
            unit=unit,
            better="higher",
            baselines=goals,
        )

    chat = [{"role": "user", "content": PROMPT}]
    with running() as (front, port):
        for path, body in (
            ("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}),
            ("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": chat, "max_tokens": 1}),
        ):
            times = REQUESTS // CONNECTIONS
            taken = measure(
                front, port, CONNECTIONS, times, post(path, body), lambda seen: seen.endswith(b"}")
            )
            add(path, times * CONNECTIONS, taken, "requests/s", {"pass": 1000, "goal": 2000})
        for path, body in (
            ("/generate_stream", {"inputs": PROMPT, "parameters": {"max_new_tokens": STREAM_TOKENS}}),
            (
                "/v1/chat/completions",
                {"messages": chat, "max_tokens": STREAM_TOKENS, "stream": True, "ignore_eos": True},
            ),
        ):
            taken = measure(
                front, port, STREAMS, ROUNDS, post(path, body), lambda seen: seen.endswith(b"0\r\n\r\n")
            )
            add(
                f"{path} streamed", STREAMS * ROUNDS * STREAM_TOKENS, taken, "tokens/s",
                {"pass": 20_000, "goal": 30_000},
            )  # fmt: skip
    report.write(out / report.device / "frontend.jsonl")
    print(report.table())


if __name__ == "__main__":
    main()
