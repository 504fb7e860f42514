"""HTTP as nobody should speak it. Numbers are rows of `docs/faults.md`."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import time
from contextlib import suppress

import psutil
import pytest

from tests.faults.conftest import (
    CANARY,
    CHAT,
    MESSAGES,
    Target,
    check_error,
    raise_limit_of_files,
    read_reply,
    until,
)
from tests.http.test_errors import DAMAGED
from tgi_server.http.state import Patience

BODY = b'{"inputs": "x", "parameters": {"max_new_tokens": 2}}'
LONG = b'{"inputs": "Once upon a time", "parameters": {"max_new_tokens": 900}}'


def sized(body: bytes) -> str:
    return f"Content-Length: {len(body)}\r\n"


@pytest.mark.parametrize("name", DAMAGED)
def test_rows_1_to_10_bodies_that_are_no_json_object(target: Target, name: str) -> None:
    for path in ("/generate", "/generate_stream", CHAT, "/tokenize"):
        check_error(path, target.send(path, DAMAGED[name]), 400)


def test_row_6_of_two_equal_keys_the_last_counts(target: Target) -> None:
    body = b'{"inputs": "x", "parameters": {"details": true, "max_new_tokens": 5, "max_new_tokens": 2}}'
    assert target.send("/generate", body).json["details"]["generated_tokens"] == 2


def test_row_9_a_byte_order_mark_is_no_obstacle(target: Target) -> None:
    assert target.send("/generate", b"\xef\xbb\xbf" + BODY).status == 200


@pytest.mark.parametrize(
    "text",
    ["\x00", "\x1b[31mred", "\u202eright to left", "\u200b" * 50, "e" + "\u0301" * 1500, "a\r\nINFO forged"],
    ids=["NUL", "ESC", "RTL", "zero width", "combining", "CRLF"],
)
def test_row_11_characters_that_are_not_letters(target: Target, text: str) -> None:
    for path, body in (
        ("/generate", {"inputs": text, "parameters": {"max_new_tokens": 2}}),
        (CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 2}),
        ("/tokenize", {"inputs": text}),
    ):
        reply = target.send(path, body)
        assert reply.status in (200, 400, 422)
    check_error(CHAT, target.send(CHAT, {"messages": MESSAGES, "model": text}), 404)
    assert "\nINFO forged" not in target.server.log


def test_row_11_a_megabyte_of_combining_marks(target: Target) -> None:
    body = '{"inputs": "e' + "\u0301" * 500_000 + '"}'
    check_error("/generate", target.send("/generate", body.encode()), 422)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "/"]
)
def test_row_12_another_content_type(target: Target, kind: str) -> None:
    assert target.send("/generate", BODY, headers={"Content-Type": kind}).status in (200, 400, 415)


def test_row_13_compressed_bodies(target: Target) -> None:
    bomb = gzip.compress(bytes(100_000_000))
    for encoding in ("gzip", "br", "zebra"):
        reply = target.send("/generate", bomb, headers={"Content-Encoding": encoding})
        check_error("/generate", reply, 415)


def test_row_14_bodies_over_the_limit(target: Target) -> None:
    announced = target.raw(target.head("/generate", "Content-Length: 100000000\r\n\r\n"))
    check_error("/generate", announced, 413)
    assert announced.headers["connection"] == "close"
    with target.connect() as sock:
        sock.sendall(target.head("/generate", "Transfer-Encoding: chunked\r\n\r\n"))
        for _ in range(3):
            sock.sendall(b"f4240\r\n" + b" " * 1_000_000 + b"\r\n")
        check_error("/generate", read_reply(sock), 413)


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: -1\r\n\r\n",
        "Content-Length: abc\r\n\r\n",
        "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "A: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["negative", "letters", "two lengths", "length and chunks", "folded"],
)
def test_row_15_lengths_that_smuggle(target: Target, lines: str) -> None:
    with target.connect() as sock:
        sock.sendall(f"POST /generate HTTP/1.1\r\nHost: x\r\n{lines}".encode())
        check_error("/generate", read_reply(sock), 400)
        assert sock.recv(1) == b"", "the connection is closed"


def test_row_16_chunks_of_one_byte(target: Target) -> None:
    for size, status in ((200_000, 200), (3_000_000, 413)):
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY.ljust(size))
        data = target.head("/generate", "Transfer-Encoding: chunked\r\n\r\n") + chunks + b"0\r\n\r\n"
        assert target.raw(data).status == status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n", 431),
    ],
    ids=["address", "one header", "many headers"],
)
def test_row_17_heads_that_are_too_long(target: Target, data: bytes, status: int) -> None:
    check_error("/", target.raw(data), status)


def test_row_18_a_thousand_clients_that_send_half_a_request(target: Target) -> None:
    raise_limit_of_files(2500)
    halves = [target.connect() for _ in range(1000)]
    for i, sock in enumerate(halves):
        sock.sendall(
            b"POST /generate HTTP/1.1\r\nHost:" if i % 2 else target.head("/generate", sized(BODY)) + b"\r\n{"
        )
    del target.ids[:]  # requests that never became whole
    for _ in range(3):
        assert target.send("/generate", BODY).status == 200
    began = time.monotonic()
    replies = []
    for sock in halves:
        sock.settimeout(60)
        replies.append(read_reply(sock).status)
        sock.close()
    assert set(replies) == {408}
    assert time.monotonic() - began < 50, "five times the ten seconds that half a request may take"


def test_row_19_ten_thousand_idle_connections_leave_others_alone(target: Target) -> None:
    raise_limit_of_files(12_000)
    front = psutil.Process(target.server.process.pid)
    files = front.rlimit(psutil.RLIMIT_NOFILE)[0]
    assert f"{files} files and connections" in target.server.log, "said at the start"
    if files < 12_000:
        pytest.skip(f"the server may open {files} files, 12000 are needed")
    idle = [target.connect() for _ in range(10_000)]
    try:
        until(lambda: front.num_fds() > 10_000, "all of them to be accepted")
        for _ in range(3):
            assert target.send("/generate", BODY).status == 200
    finally:
        for sock in idle:
            sock.close()


def test_row_20_a_client_that_has_nothing_more_to_say_is_answered(target: Target) -> None:
    data = target.head("/generate", sized(BODY)) + b"\r\n" + BODY
    assert target.raw(data, half_close=True).status == 200


@pytest.mark.parametrize("moment", ["in the body", "before the first token", "in the stream"])
def test_row_21_resets(target: Target, moment: str) -> None:
    before = target.metrics()["tgi_request_aborts_total"]
    for _ in range(5):
        with target.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            head = target.head("/generate_stream", sized(LONG)) + b"\r\n"
            sock.sendall(head + (LONG[:10] if moment == "in the body" else LONG))
            if moment == "in the stream":
                sock.recv(1000)
    until(lambda: target.metrics()["tgi_request_aborts_total"] == before + 5, "each to be counted as dropped")


def slow_reader(target: Target) -> socket.socket:
    """A stream of which the client's side takes as little as its kernel allows; small packets keep ours low, too."""
    asked = {"messages": MESSAGES, "max_tokens": 900, "stream": True, "ignore_eos": True}
    body = json.dumps({**asked, "logprobs": True, "top_logprobs": 20}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    sock.connect(target.server.address)
    sock.sendall(target.head(CHAT, sized(body)) + b"\r\n" + body)
    return sock


def test_row_22_a_client_that_reads_a_byte_a_second_slows_nobody_and_is_cut_off(target: Target) -> None:
    before = target.metrics()
    answered = 0
    with slow_reader(target) as sock, suppress(ConnectionResetError):
        sock.settimeout(1)
        deadline = time.monotonic() + 5 * Patience().stalled_s
        while target.metrics()["tgi_request_aborts_total"] == before["tgi_request_aborts_total"]:
            assert time.monotonic() < deadline, "its buffers are full, and it is still waited for"
            assert target.send("/generate", CANARY).status == 200
            answered += 1
            time.sleep(1)
            assert len(sock.recv(1)) == 1
    assert answered > 3, "others were answered while it was waited for"
    assert "stopped reading" in target.server.log


def test_row_23_old_new_and_hasty_clients(target: Target) -> None:
    request = target.head("/generate", sized(BODY)) + b"\r\n" + BODY
    with target.connect() as sock:
        sock.sendall(request + target.head("/generate", sized(BODY)) + b"\r\n" + BODY)
        answers = b""
        while answers.count(b"generated_text") < 2:
            answers += sock.recv(65536)
        assert answers.count(b"200 OK") == 2
    asking = target.head("/generate", sized(BODY) + "Expect: 100-continue\r\n\r\n")
    assert target.raw(asking + BODY).status == 200
    with target.connect() as sock:
        sock.sendall(target.head("/generate", sized(BODY) + "Expect: 100-continue\r\n\r\n"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert read_reply(sock).status == 200
    old = target.head("/generate", sized(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert target.raw(old + b"\r\n" + BODY).status == 200
    assert target.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status in (400, 505)
    with target.connect() as sock:
        newer = target.head("/generate", sized(BODY)).replace(b"HTTP/1.1", b"HTTP/2.0")
        sock.sendall(newer + b"\r\n" + BODY)
        assert sock.recv(100).split()[1] in (b"400", b"505")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/generate", 405),
        ("DELETE", CHAT, 405),
        ("PROPFIND", "/generate", 405),
        ("POST", "/health", 405),
        ("POST", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("POST", "/generate/", 404),
        ("POST", "//generate", 404),
        ("POST", "/v1%2Fchat%2Fcompletions", 404),
        ("POST", "/../etc/passwd", 404),
    ],
)
def test_row_24_methods_and_paths_that_do_not_exist(
    target: Target, method: str, path: str, status: int
) -> None:
    reply = target.send(path, {}, method=method)
    check_error(path.replace("%2F", "/"), reply, status)
    assert ("allow" in reply.headers) == (status == 405)


def test_noise_is_refused_and_forgotten(target: Target) -> None:
    for seed in range(20):
        noise = bytes((seed * 31 + i * 7919) % 256 for i in range(300))
        with target.connect() as sock:
            sock.sendall(noise + b"\r\n\r\n")
            until(lambda sock=sock: bool(sock.recv(100)) or True, "an answer or an end")
