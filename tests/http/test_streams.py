from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
from aiohttp.test_utils import TestClient

from tests.http.conftest import ALL, Start
from tests.http.events import read_events
from tests.http.fake_engine import FakeEngine
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.state import Patience

Say = Callable[..., FakeEngine]
CHAT = "/v1/chat/completions"
BODY = {"inputs": "x", "messages": [{"role": "user", "content": "hello"}], "stream": True}
GONE = UserError(ErrorKind.UNAVAILABLE, "the engine process has ended")


async def until(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_an_engine_that_dies_ends_a_tgi_stream_with_its_error(start: Start, say: Say) -> None:
    client = await start(say("hello world", fail_at=2, failure=GONE))
    response = await client.post("/generate_stream", json=BODY)
    assert response.status == 200
    *tokens, error = await read_events(response)
    assert len(tokens) == 2
    assert error == {"error": "the engine process has ended", "error_type": "unavailable"}


async def test_an_engine_that_dies_ends_an_openai_stream_with_its_error_and_no_done(
    start: Start, say: Say
) -> None:
    client = await start(say("hello world", fail_at=2, failure=GONE))
    *_, error = await read_events(await client.post(CHAT, json=BODY))
    assert error["error"]["message"] == "the engine process has ended"
    assert error["error"]["type"] == "server_error"
    assert error["error"]["code"] == "unavailable"


async def test_a_defect_in_the_middle_of_a_stream_is_told_without_details(start: Start, say: Say) -> None:
    client = await start(say("hello world", fail_at=1, failure=RuntimeError("secret")))
    response = await client.post("/generate_stream", json=BODY)
    *_, error = await read_events(response)
    assert error["error_type"] == "internal"
    assert response.headers["X-Request-Id"] in error["error"]
    assert "secret" not in error["error"]


async def test_headers_go_out_after_a_while_and_comments_fill_the_silence(start: Start, say: Say) -> None:
    client = await start(say("ab", stall_at=0), patience=Patience(headers_s=0.05, keep_alive_s=0.05))
    response = await client.post(CHAT, json=BODY)
    assert response.status == 200
    assert await response.content.readuntil(b":\n\n") == b":\n\n"
    assert await response.content.readuntil(b":\n\n") == b":\n\n"
    response.close()


async def test_an_error_after_the_headers_is_an_event(start: Start, say: Say) -> None:
    engine = say("ab", delay_s=0.2, fail_at=0, failure=GONE)
    client = await start(engine, patience=Patience(headers_s=0.05))
    response = await client.post("/generate_stream", json=BODY)
    assert response.status == 200
    assert (await read_events(response))[-1]["error_type"] == "unavailable"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", CHAT])
@pytest.mark.parametrize("stall_at", [0, 3])
async def test_a_client_that_leaves_cancels_its_request(
    start: Start, say: Say, path: str, stall_at: int
) -> None:
    engine = say("hello world", stall_at=stall_at)
    client = await start(engine)
    task = asyncio.create_task(send(client, path, BODY))
    await until(lambda: engine.running == 1)
    await asyncio.sleep(0.05)
    task.cancel()
    await until(lambda: engine.running == 0)
    assert engine.cancelled == 1


async def test_a_client_that_leaves_cancels_all_of_its_choices(start: Start, say: Say) -> None:
    engine = say("hello world", stall_at=2)
    client = await start(engine, honoured=ALL)
    task = asyncio.create_task(send(client, CHAT, {**BODY, "n": 4}))
    await until(lambda: engine.running == 4)
    task.cancel()
    await until(lambda: engine.running == 0)
    assert engine.cancelled == 4


async def test_an_error_of_one_choice_ends_the_others(start: Start, say: Say) -> None:
    engine = say("hello", fail_at=1, failure=UserError(ErrorKind.GENERATION, "no"))
    client = await start(engine, honoured=ALL)
    response = await client.post(CHAT, json={**BODY, "n": 4, "stream": False})
    assert response.status == 500
    assert engine.running == 0


async def test_a_reader_that_stops_reading_is_cut_off(start: Start, say: Say) -> None:
    engine = say("x" * 1000)
    patience = Patience(headers_s=0.01, keep_alive_s=0.05, stalled_s=0.3)
    client = await start(engine, patience=patience, max_total_tokens=1_000_000)
    loop = asyncio.get_running_loop()
    data = b'{"messages": [{"role": "user", "content": "x"}], "stream": true, "ignore_eos": true}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, (client.server.host, client.server.port))
        await loop.sock_sendall(sock, head + data)
        await until(lambda: engine.running == 1)
        await until(lambda: engine.running == 0, within_s=20)
    assert engine.cancelled == 1


async def send(client: TestClient, path: str, body: object) -> None:
    response = await client.post(path, json=body)
    await response.read()
