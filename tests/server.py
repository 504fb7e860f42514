"""A real server in its own process, for tests that need one."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "SmolLM2-135M-Instruct"
START_TIMEOUT_S = 60


def computes_on_gpu() -> bool:
    """Whether servers do that are not told what to compute on."""
    device = os.environ.get("DEVICE", "auto")
    return torch.cuda.is_available() if device == "auto" else device == "cuda"


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.split("://")[1].rsplit(":", 1)
        return host, int(port)

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def engine(self) -> psutil.Process:
        """The child process that computes."""
        return self._child("tgi_server.engine")

    def _child(self, module: str) -> psutil.Process:
        (child,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE and module in child.cmdline()
        ]
        return child

    def post(self, path: str, body: object, timeout_s: float = 120) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def stream(self, path: str, body: object, timeout_s: float = 120) -> Iterator[dict[str, Any]]:
        """The JSON of each server-sent event."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            for line in response:
                if line.startswith(b"data:") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[5:])

    def tokens_in(self, seconds: float) -> int:
        """About as many as a stream gets in that time: engines differ a hundredfold."""
        body = {"prompt": "Once upon a time", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
        began = time.monotonic()
        self.post("/v1/completions", body)
        return max(1, int(48 * seconds / (time.monotonic() - began)))


@contextmanager
def running_server(
    *options: str,
    model: Path = DEMO,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start `tgi-server serve` on a free port and wait for its ready line.

    prefix: a command that becomes the server, such as `prlimit --nofile=256 --`. environment: instead of ours.
    """
    assert model.is_file() or (model / "config.json").exists(), f"{model} is missing; `make test` fetches it"
    command = [
        *prefix,
        sys.executable,
        "-m",
        "tgi_server.cli",
        "serve",
        "--model-id",
        str(model),
        "--port",
        "0",
        *options,
    ]
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, env=environment)
        with _ended(process, log_file):
            yield Server(process, _ready_url(process), log_file)


@contextmanager
def _ended(process: subprocess.Popen[bytes], log_file: Path) -> Iterator[None]:
    """End the process in the end; what it had to say goes where pytest shows it for a failed test."""
    try:
        yield
    finally:
        sys.stderr.write(log_file.read_text(encoding="utf-8", errors="replace")[-4000:])
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _ready_url(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + START_TIMEOUT_S
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            selector.select(timeout=1)
            seen += process.stdout.read() or b""
            if ready := re.search(rb"is ready on (https?://\S+)\n", seen):
                return ready.group(1).decode()
            assert process.poll() is None, f"the server ended with {process.returncode}: {seen!r}"
    raise AssertionError(f"not ready within {START_TIMEOUT_S} s: {seen!r}")
