"""What only a GPU can do wrong, to a whole server; to the engine alone: tests/engine/test_gpu_failures.py.

Numbers are rows of `docs/faults.md`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import until
from tests.faults.tiny_model import write_model
from tests.server import Server, running_server

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = ("--device", "cuda", "--cuda-memory-fraction", "0.05")
TAKE_ALL = """
import sys, torch
held, size = [], 1 << 36
while size >= 1 << 21:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        size //= 2
print(sum(map(len, held)), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", eos_token_id=None)


@contextmanager
def memory_taken() -> Iterator[None]:
    """By another process, all but what is too little for anybody."""
    command = [sys.executable, "-c", TAKE_ALL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        try:
            assert int(other.stdout.readline()) > 0
            yield
        finally:
            other.kill()


def asked(i: int) -> dict[str, Any]:
    """Prompts as long as they may be; every other is drawn for, with all that draws may ask for."""
    drawn = {
        "do_sample": True,
        "seed": i,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "top_n_tokens": 3,
        "details": True,
    }
    return {"inputs": f"{i:02} " * 130, "parameters": {"max_new_tokens": 20, **(drawn if i % 2 else {})}}


def outcome(server: Server, i: int) -> tuple[int, str]:
    try:
        return 200, server.post("/generate", asked(i))["generated_text"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


@pytest.mark.alone
def test_row_87_memory_that_another_process_takes_costs_at_most_some_answers(model: Path) -> None:
    with running_server(*CUDA, model=model) as server, ThreadPoolExecutor(32) as pool:
        before = list(pool.map(lambda i: outcome(server, i), range(64)))
        assert {status for status, _ in before} == {200}
        with memory_taken():
            during = list(pool.map(lambda i: outcome(server, i), range(64)))
        for was, (status, text) in zip(before, during, strict=True):
            assert (status, text) == was or (status == 503 and "GiB of GPU memory" in text)
        assert list(pool.map(lambda i: outcome(server, i), range(64))) == before
        until(lambda: server.get("/info")["engine"]["running"] == 0, "the engine to be idle")


def test_row_88_an_illegal_access_ends_the_service_and_nothing_wrong_is_said_before(model: Path) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 100}}
    with running_server(*CUDA, model=model) as server:
        right = [event["token"]["id"] for event in server.stream("/generate_stream", body)]
    poisoned = [sys.executable, "-m", "tests.faults.poisoned_server"]
    with running_server(*CUDA, model=model, prefix=poisoned) as server:
        began = time.monotonic()
        *tokens, last = server.stream("/generate_stream", body)
        assert last["error_type"] == "unavailable" and "the engine process has ended" in last["error"]
        said = [event["token"]["id"] for event in tokens]
        assert 0 < len(said) < len(right) and said == right[: len(said)]
        assert server.process.wait(timeout=10) == 1
        assert time.monotonic() - began < 15
        assert server.log.count("CRITICAL") == 1 and "illegal" in server.log
