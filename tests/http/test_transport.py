from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine
from tests.http.test_streams import until
from tgi_server.http.state import Patience

Say = Callable[..., FakeEngine]
BODY = b'{"inputs": "x"}'


def post(body: bytes = BODY, path: str = "/generate", headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


async def connect(client: TestClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(client.server.host, client.server.port)


async def say_raw(client: TestClient, data: bytes, *, half_close: bool = False) -> tuple[int, Any]:
    """Send bytes; the last status line's code and the body as JSON."""
    reader, writer = await connect(client)
    writer.write(data)
    if half_close:
        writer.write_eof()
    status = 100
    while status == 100:
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode()
        status = int(head.split()[1])
    length = next(line for line in head.split("\r\n") if line.lower().startswith("content-length"))
    body = await reader.readexactly(int(length.split(":")[1]))
    writer.close()
    return status, json.loads(body) if body else None


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n", 431),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA\x00: b\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (post().replace(b"HTTP/1.1", b"HTTP/2.0"), 400),
        (b"GET /health\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 415),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_no_http_is_answered_in_json_and_without_a_traceback(
    start: Start, say: Say, data: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = await start(say("a"))
    answered, error = await say_raw(client, data)
    assert answered == status
    assert set(error) == {"error", "error_type"}
    assert not [record for record in caplog.records if record.exc_info]
    assert (await client.get("/health")).status == 200


async def test_a_half_closed_connection_still_gets_its_answer(start: Start, say: Say) -> None:
    engine = say("hello", delay_s=0.1)
    client = await start(engine)
    status, body = await say_raw(client, post(), half_close=True)
    assert status == 200
    assert body == {"generated_text": "hello"}
    assert engine.cancelled == 0


async def test_a_half_closed_stream_is_streamed_to_its_end(start: Start, say: Say) -> None:
    client = await start(say("hello world", delay_s=0.05))
    reader, writer = await connect(client)
    writer.write(post(path="/generate_stream"))
    await reader.readuntil(b'"index":1')
    writer.write_eof()
    rest = await asyncio.wait_for(reader.read(), 5)
    assert b'"generated_text":"hello world"' in rest


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize("stall_at", [0, 2])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_closed_connection_cancels_within_moments(
    start: Start, say: Say, path: str, stall_at: int, reset: bool
) -> None:
    engine = say("hello world", stall_at=stall_at)
    client = await start(engine)
    reader, writer = await connect(client)
    writer.write(post(path=path))
    await until(lambda: engine.running == 1)
    if stall_at and path == "/generate_stream":
        await reader.readuntil(b'"index":2')
    if reset:
        writer.transport.abort()
    else:
        writer.close()
    await until(lambda: engine.running == 0, within_s=1)
    assert engine.cancelled == 1


async def test_a_connection_that_breaks_inside_its_body_starts_nothing(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine)
    _, writer = await connect(client)
    writer.write(post()[:-3])
    await asyncio.sleep(0.05)
    writer.close()
    await asyncio.sleep(0.05)
    assert not engine.requests
    assert (await client.get("/health")).status == 200


async def test_a_body_that_drips_is_a_408(start: Start, say: Say) -> None:
    client = await start(say("a"), patience=Patience(body_s=0.1))
    status, error = await say_raw(client, post()[:-3])
    assert status == 408
    assert error["error_type"] == "timeout"


async def test_a_body_that_came_fast_may_not_stop_for_long(start: Start, say: Say) -> None:
    client = await start(say("a"), patience=Patience(body_s=0.2))
    status, error = await say_raw(client, post(b"x" * 100_000)[:-3])
    assert status == 408
    assert "99997 bytes" in error["error"]


async def ask_for_much(client: TestClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The answer has some ten megabytes, of which few fit into buffers."""
    writer: asyncio.StreamWriter
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((client.server.host, client.server.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=65_536)
    writer.write(post(json.dumps({"inputs": "x" * 250_000}).encode(), path="/tokenize"))
    return reader, writer


async def test_a_reader_that_leaves_its_answer_is_cut_off(
    start: Start, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start(say("a"), patience=Patience(stalled_s=0.3), max_total_tokens=300_000)
    reader, writer = await ask_for_much(client)
    await reader.readuntil(b"200 OK")
    await until(lambda: "the client stopped reading, it took 0 bytes in 0.3 s" in caplog.text)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(12_000_000)
    writer.close()


async def test_a_reader_that_is_slow_but_steady_gets_it_all(start: Start, say: Say) -> None:
    client = await start(say("a"), patience=Patience(stalled_s=1.0), max_total_tokens=300_000)
    reader, writer = await ask_for_much(client)
    head = await reader.readuntil(b"\r\n\r\n")
    left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while left:
        left -= len(await reader.readexactly(min(left, 100_000)))
        await asyncio.sleep(0.02)
    writer.close()


async def test_a_body_in_chunks_of_one_byte_is_read(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"inputs": "' + b"x" * 50 + b'"}')
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, _ = await say_raw(client, head + chunks + b"0\r\n\r\n")
    assert status == 200
    assert len(engine.requests[0].prompt_ids) == 51


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (
            post(headers="Content-Type: a/b\r\nContent-Type: c/d\r\n"),
            "Duplicate 'Content-Type' header found.",
        ),
        (post().replace(b"Length: 15", b"Length: +15"), "Invalid character in Content-Length"),
        (post(headers="A : b\r\n"), "Invalid header token"),
        (post(path="*"), "Invalid address"),
        (post().replace(b"HTTP/1.1", b"HTTP/1.7"), "Invalid HTTP version"),
        (post(path="/é"), "Invalid address"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_wrong_with_a_request_is_named_without_its_bytes(
    start: Start, say: Say, data: bytes, fault: str
) -> None:
    client = await start(say("a"))
    status, body = await say_raw(client, data)
    assert (status, body["error"]) == (400, f"this is not a valid HTTP request: {fault}")


async def test_a_body_encoded_twice_is_refused_whichever_header_says_so(start: Start, say: Say) -> None:
    client = await start(say("a"))
    two = "Content-Encoding: identity\r\nContent-Encoding: gzip\r\n"
    assert (await say_raw(client, post(headers=two)))[0] == 415
    assert (await say_raw(client, post(headers="Content-Encoding: \r\n")))[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /generate HTTP/1.1\r\nContent-Length: 999999999", 413),
        ("POST /generate HTTP/1.1\r\nContent-Length: 9\r\nContent-Encoding: gzip", 415),
        ("POST /generate HTTP/1.1\r\nContent-Length: 9\r\nAuthorization: Bearer wrong", 401),
    ],
)
async def test_a_client_that_asks_before_sending_is_refused_before_it_sends(
    start: Start, say: Say, head: str, status: int
) -> None:
    client = await start(say("a"), api_keys=("right",))
    reader, writer = await connect(client)
    key = "" if "Bearer" in head else "Authorization: Bearer right\r\n"
    writer.write(f"{head}\r\nHost: x\r\n{key}Expect: 100-continue\r\n\r\n".encode())
    assert f"HTTP/1.1 {status} ".encode() in await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
    writer.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "zebra", "gzip, gzip"])
async def test_a_compressed_body_is_refused_without_looking_into_it(
    start: Start, say: Say, encoding: str
) -> None:
    client = await start(say("a"))
    bomb = gzip.compress(bytes(100_000_000))
    response = await client.post("/generate", data=bomb, headers={"Content-Encoding": encoding})
    assert response.status == 415
    assert encoding in (await response.json())["error"]
    assert (await client.post("/generate", data=BODY, headers={"Content-Encoding": "identity"})).status == 200


async def test_pipelined_requests_and_continue_and_http_1_0_are_served(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    reader, writer = await connect(client)
    writer.write(post() + post())
    for _ in range(2):
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"}")
    head, body = post(headers="Expect: 100-Continue\r\n").split(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
    writer.write(body)
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert (await say_raw(client, post().replace(b"HTTP/1.1", b"HTTP/1.0")))[0] == 200


async def test_half_sent_headers_are_a_408_after_a_while(start: Start, say: Say) -> None:
    client = await start(say("a"), patience=Patience(head_s=0.2))
    status, error = await say_raw(client, b"POST /generate HTTP/1.1\r\nHost:")
    assert status == 408
    assert error["error_type"] == "timeout"


async def test_headers_that_drip_get_no_more_time(start: Start, say: Say) -> None:
    client = await start(say("a"), patience=Patience(head_s=0.2))
    reader, writer = await connect(client)
    for line in (b"GET /health HTTP/1.1\r\n", b"A: b\r\n", b"C: d\r\n", b"E: f\r\n"):
        writer.write(line)
        await asyncio.sleep(0.04)
    assert b"408" in await asyncio.wait_for(reader.read(), 5)


async def test_a_slow_answer_is_no_slow_request(start: Start, say: Say) -> None:
    client = await start(say("hello world", delay_s=0.1), patience=Patience(head_s=0.2))
    for _ in range(2):
        assert (await client.post("/generate", data=BODY)).status == 200


async def test_incomplete_headers_take_little_memory(start: Start, say: Say) -> None:
    client = await start(say("a"))
    head = b"GET /health HTTP/1.1\r\n" + b"".join(b"A%d: %s\r\n" % (i, b"x" * 8000) for i in range(9))
    status, error = await say_raw(client, head)
    assert status == 431
    assert "65536" in error["error"]


async def test_a_thousand_idle_connections_leave_the_others_alone(start: Start, say: Say) -> None:
    client = await start(say("a"))
    opened = [await connect(client) for _ in range(1000)]
    for _, writer in opened:
        writer.write(b"POST /generate HTTP/1.1\r\nHost:")
    assert (await client.post("/generate", data=BODY)).status == 200
    for _, writer in opened:
        writer.close()
