"""What only a real GPU can do wrong: run out of memory while it serves, and be lost."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.in_process import InProcess
from tests.engine.gpu_rig import CONFIG, answers, engine, events, prompts
from tgi_server.engine.channel import encode_config
from tgi_server.engine.client import EngineClient
from tgi_server.engine.request import FinishReason, GenerationRequest
from tgi_server.errors import ErrorKind, StartupError, UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LONG = [[i, *prompts(40)[-1][:1] * 300] for i in range(60)]


class Hog:
    """Somebody else who takes the GPU's memory, all but so much."""

    def __init__(self, leave_bytes: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info()
        self._held = [torch.empty(free_bytes - leave_bytes, dtype=torch.uint8, device="cuda")]

    def take_rest(self) -> None:
        """All, down to what the smallest step needs."""
        size = 1 << 30
        while size >= 512:
            try:
                self._held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2

    def release(self) -> None:
        self._held.clear()
        torch.cuda.empty_cache()


@pytest.fixture
def rig(llama: Path) -> InProcess:
    return engine(llama, max_batch_tokens=16384, max_sequences=64, num_pages=1500)


def finishes(rig: InProcess, asked: list[list[int]]) -> list[tuple[FinishReason | None, str]]:
    names = [rig.submit(prompt, 5) for prompt in asked]
    while not all(events(rig, name) and events(rig, name)[-1].finish for name in names):
        rig.engine.step()
    return [(events(rig, name)[-1].finish, events(rig, name)[-1].error) for name in names]


def test_when_somebody_else_takes_the_memory_steps_shrink_and_answers_come(rig: InProcess) -> None:
    """The step of 16384 tokens needs 64 MiB and more: each [tokens, hidden] 16, the MLP's inner values 32."""
    hog = Hog(leave_bytes=32 << 20)
    try:
        found = finishes(rig, LONG)
    finally:
        hog.release()
    assert found == [(FinishReason.LENGTH, "")] * len(LONG)
    assert rig.engine._steps.failed_prefill_steps > 0


def test_without_any_memory_requests_end_with_the_numbers_and_the_engine_goes_on(rig: InProcess) -> None:
    before = answers(rig, [[5, 6, 7]])
    hog = Hog(leave_bytes=64 << 20)
    hog.take_rest()
    try:
        found = finishes(rig, LONG)
    finally:
        hog.release()
    errors = [error for finish, error in found if finish is FinishReason.EXHAUSTED]
    assert errors and all("GiB of GPU memory" in error for error in errors)
    assert {finish for finish, _ in found} <= {FinishReason.EXHAUSTED, FinishReason.LENGTH}
    assert rig.engine._pool.available == rig.engine._pool.total
    assert finishes(rig, [[5, 6, 8]]) == [(FinishReason.LENGTH, "")]
    rig.wire.errors.clear()
    assert answers(rig, [[5, 6, 7]]) == before


def test_a_share_of_the_memory_that_leaves_no_room_is_refused_with_the_numbers(llama: Path) -> None:
    try:
        with pytest.raises(StartupError, match="after the weights and a reserve of 4 GiB"):
            engine(llama, memory_fraction=0.02)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_illegal_access_ends_the_engine_and_its_clients_are_told(llama: Path) -> None:
    (right,) = answers(engine(llama), [[1, 2, 3]], new_tokens=20)
    said = asyncio.run(_lose_the_device(llama))
    assert 0 < len(said) < 20 and said == [token for token, _ in right[: len(said)]]


async def _lose_the_device(llama: Path) -> list[int]:
    """What was said before the device was lost."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.poisoned_engine"],
            stdin=theirs.fileno(),
            stderr=subprocess.PIPE,
            text=True,
        )
    ours.sendall(encode_config(replace(CONFIG, model=llama)))
    client = await EngineClient.connect(ours)
    assert await client.wait_ready()
    request = GenerationRequest(id="1", prompt_ids=[1, 2, 3], max_new_tokens=200)
    began = time.monotonic()
    said: list[int] = []
    with pytest.raises(UserError) as caught:
        async for event in client.submit(request):
            said += event.token_ids
    assert time.monotonic() - began < 10
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert client.status.phase == "failed" and "is lost" in client.status.detail
    _, log = await asyncio.to_thread(process.communicate, None, 20)
    assert process.returncode not in (0, None)
    assert log.count("is lost") == 1
    await client.close()
    return said
