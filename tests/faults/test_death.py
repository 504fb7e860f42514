"""Processes that die, clients that leave."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time

import psutil
import pytest

from tests.server import Server, running_server

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4000}}
CHAT = {
    "messages": [{"role": "user", "content": "Count to ten thousand."}],
    "stream": True,
    "max_tokens": 4000,
}


def test_clients_of_a_killed_engine_get_an_error_event_and_the_service_ends() -> None:
    with running_server() as server:
        streams = [server.stream("/generate_stream", LONG), server.stream("/v1/chat/completions", CHAT)]
        for stream in streams:
            next(stream)
        server.engine.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        last = [list(stream)[-1] for stream in streams]
        assert time.monotonic() - killed < 1.0
        assert last[0]["error_type"] == "unavailable"
        assert "engine" in last[1]["error"]["message"]
        assert server.process.wait(timeout=10) != 0
        assert time.monotonic() - killed < 10


def test_a_killed_front_end_leaves_no_orphan() -> None:
    with running_server() as server:
        engine = server.engine
        next(server.stream("/generate_stream", LONG))
        server.process.kill()
        _, alive = psutil.wait_procs([engine], timeout=5)
        assert not alive


def test_sigterm_ends_the_service_cleanly() -> None:
    with running_server() as server:
        engine = server.engine
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
        assert not engine.is_running()


@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
def test_a_client_that_leaves_frees_its_pages(server: Server, path: str) -> None:
    address = server.url.removeprefix("http://")
    before = _free_pages(server)
    connection = http.client.HTTPConnection(address)
    connection.request("POST", path, json.dumps(LONG), {"Content-Type": "application/json"})
    if path == "/generate_stream":
        connection.getresponse().readline()
    deadline = time.monotonic() + 5
    while _free_pages(server) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _free_pages(server) < before
    connection.close()
    deadline = time.monotonic() + 2  # status messages come every half second
    while _free_pages(server) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _free_pages(server) == before


def _free_pages(server: Server) -> int:
    status = server.get("/info")["engine"]
    assert isinstance(status, dict)
    return int(status["free_pages"])


def test_the_engine_listens_nowhere(server: Server) -> None:
    assert not [c for c in server.engine.net_connections() if c.status == psutil.CONN_LISTEN]
    assert os.getsid(server.engine.pid) != os.getsid(0)
