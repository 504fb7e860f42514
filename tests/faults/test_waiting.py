"""A limit on waiting in the queue. Numbers are rows of the list of faults this suite was written from."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.faults.conftest import Reply, check_error, until
from tests.server import Server, running_server

LIMIT_S = 0.5
RUNNING = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4000}}
WAITING = [
    ("/generate", {"inputs": "Never begun " * 40}),
    ("/generate_stream", {"inputs": "Never begun " * 40}),
    ("/v1/completions", {"prompt": "Never begun " * 40, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Never begun " * 40}]}),
]


@pytest.fixture
def narrow() -> Iterator[Server]:
    """One sequence at a time, and half a second of patience."""
    with running_server("--max-sequences", "1", "--queue-timeout-s", str(LIMIT_S)) as server:
        yield server


def send(server: Server, path: str, body: object) -> Reply:
    with closing(http.client.HTTPConnection(*server.address, timeout=60)) as connection:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, named, response.read())


def engine(server: Server) -> dict[str, int]:
    status = server.get("/info")["engine"]
    assert isinstance(status, dict)
    return status


def test_row_72_a_request_that_waits_too_long_is_answered_503_and_takes_no_memory(narrow: Server) -> None:
    with closing(http.client.HTTPConnection(*narrow.address, timeout=60)) as connection:
        connection.request("POST", "/generate_stream", json.dumps(RUNNING))
        stream = connection.getresponse()
        assert stream.status == 200 and stream.readline().startswith(b"data:")
        until(lambda: engine(narrow)["running"] == 1, "the engine to say so")
        begun = engine(narrow)["prompt_tokens"]
        for path, body in WAITING:
            reply = send(narrow, path, body)
            message = check_error(path, reply, 503)
            assert "0.5 s are the most" in message
            error = reply.json
            word = error["error"]["type"] if path.startswith("/v1/") else error["error_type"]
            assert word == ("timeout_error" if path.startswith("/v1/") else "timeout")
            assert int(reply.headers["retry-after"]) >= 1
        assert engine(narrow)["prompt_tokens"] == begun, "no page was taken for them"
        assert narrow.get("/info")["engine"]["running"] == 1
        assert stream.readline() and stream.readline().startswith(b"data:"), "the one that runs goes on"
    with closing(http.client.HTTPConnection(*narrow.address, timeout=10)) as connection:
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
    assert f'tgi_request_rejections_total{{reason="timeout"}} {len(WAITING)}' in metrics
    assert f'tgi_request_failure{{err="timeout"}} {len(WAITING)}' in metrics
    until(lambda: engine(narrow)["running"] == 0, "the stream whose client left to end")
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 2}}
    assert send(narrow, "/generate", body).status == 200
