"""Client and engine over the real socket; the model is the fake one, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from tests.engine.fake_runner import FakeLaunched, FakeRunner, expected
from tgi_server.config import EngineConfig
from tgi_server.engine.channel import HEADER, Channel, PeerGone, encode_config
from tgi_server.engine.client import EngineClient
from tgi_server.engine.engine import Engine
from tgi_server.engine.plan import Plan
from tgi_server.engine.request import FinishReason, GenerationRequest
from tgi_server.errors import ErrorKind, UserError

CONFIG = EngineConfig(
    model=Path("nowhere"),
    max_total_tokens=4096,
    max_batch_tokens=64,
    max_sequences=16,
    max_queue=20,
    num_pages=2000,
    num_threads=1,
)
FORBIDDEN = 13  # a prompt with this token makes its step fail


class PickyRunner(FakeRunner):
    def launch(self, plan: Plan) -> FakeLaunched:
        if any(FORBIDDEN in work.token_ids and work.start == 0 for work in plan.work):
            raise RuntimeError("injected")
        return super().launch(plan)


@pytest_asyncio.fixture(params=[0, 1], ids=["depth0", "depth1"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    ours, theirs = socket.socketpair()
    engine = Engine(CONFIG, PickyRunner(), Channel(theirs), depth=request.param)

    def serve() -> None:
        with theirs, pytest.raises(PeerGone):
            engine.run()

    thread = threading.Thread(target=serve)
    thread.start()
    connected = await EngineClient.connect(ours)
    assert await connected.wait_ready()
    yield connected
    await connected.close()
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive(), "the engine must end when its front end is gone"


def ask(name: str, prompt: list[int], new: int = 20) -> GenerationRequest:
    return GenerationRequest(id=name, prompt_ids=prompt, max_new_tokens=new)


async def answer(client: EngineClient, request: GenerationRequest) -> list[int]:
    return [token async for event in client.submit(request) for token in event.token_ids]


async def free_pages(client: EngineClient) -> int:
    """What the next status message says."""
    heard = client.status
    while client.status is heard:
        await asyncio.sleep(0.01)
    return client.status.free_pages


async def test_many_requests_at_once_each_get_their_own_tokens(client: EngineClient) -> None:
    asked = [ask(str(i), [i + 20] * (3 * i + 1)) for i in range(16)]
    answers = await asyncio.gather(*(answer(client, one) for one in asked))
    assert answers == [expected(one) for one in asked]


async def test_leaving_the_stream_cancels_the_request_and_frees_its_pages(client: EngineClient) -> None:
    stream = client.submit(ask("long", [1] * 100, new=3900))
    async for event in stream:
        if event.token_ids:
            break
    await stream.aclose()
    assert await free_pages(client) == CONFIG.num_pages
    assert client.status.running == 0


async def test_a_full_queue_refuses_with_overloaded(client: EngineClient) -> None:
    streams = [client.submit(ask(str(i), [100 + i], new=3900)) for i in range(CONFIG.max_queue)]
    tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.sleep(0.05)
    with pytest.raises(UserError) as refused:
        await answer(client, ask("more", [1]))
    assert refused.value.kind is ErrorKind.OVERLOADED
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_failing_step_ends_its_request_and_the_engine_goes_on(
    client: EngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError) as failed:
        await answer(client, ask("bad", [FORBIDDEN]))
    assert failed.value.kind is ErrorKind.GENERATION
    assert "injected" not in failed.value.message
    assert "injected" in caplog.text
    good = ask("good", [5, 6])
    assert await answer(client, good) == expected(good)


async def test_the_death_of_the_engine_reaches_every_stream(client: EngineClient) -> None:
    async def read(stream_id: str) -> ErrorKind:
        with pytest.raises(UserError) as gone:
            async for _ in client.submit(ask(stream_id, [1], new=4000)):
                client.mark_dead("killed by the test")
        return gone.value.kind

    assert await asyncio.gather(read("a"), read("b")) == [ErrorKind.UNAVAILABLE] * 2
    with pytest.raises(UserError):
        await answer(client, ask("late", [1]))
    assert not client.alive and client.status.detail == "killed by the test"


async def test_requests_before_the_engine_is_ready_are_refused_with_the_phase() -> None:
    ours, theirs = socket.socketpair()
    client = await EngineClient.connect(ours)
    with pytest.raises(UserError, match="starting, not ready yet"):
        await answer(client, ask("early", [1]))
    theirs.close()
    assert not await client.wait_ready()
    await client.close()


def test_the_configuration_survives_the_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_config(CONFIG))
        assert Channel(theirs).receive_config() == CONFIG


@pytest.mark.parametrize(
    "bytes_sent",
    [HEADER.pack(0xFFFFFFFF), b"\x01\x00\x00\x00\xc1", HEADER.pack(3) + b"abc"],
    ids=["absurd length", "no message", "not msgpack of ours"],
)
def test_a_broken_stream_is_noticed_not_obeyed(bytes_sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(bytes_sent)
        with pytest.raises((PeerGone, msgspec.DecodeError)):
            Channel(theirs).receive(timeout_s=1.0)


def test_reasons_on_the_wire_are_words() -> None:
    assert msgspec.json.encode(FinishReason.EOS) == b'"eos"'
