"""A real server that survives everything, and what must be true of it after every case."""

from __future__ import annotations

import http.client
import json
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psutil
import pytest

from tests.server import Server, running_server
from tgi_server.http.metrics import GENERATING

CANARY = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say hello."}]
MAX_QUEUE = 24
MAX_TOKENS = 1024

_SETTLE_S = 10.0  # five times the two seconds in which a server should be itself again
_MORE_FDS, _MORE_THREADS, _MORE_MB = 4, 8, 64


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Target:
    """The server under attack. Every request sent through it carries an id, which the log must show once."""

    server: Server
    key: str | None = None  # sent with every request that brings none of its own
    ids: list[str] = field(default_factory=list)

    def new_id(self) -> str:
        self.ids.append(f"case-{uuid4().hex}")
        return self.ids[-1]

    def send(
        self,
        path: str,
        body: object = None,
        *,
        method: str = "POST",
        headers: Mapping[str, str | None] | None = None,
    ) -> Reply:
        """One request on a connection of its own.

        body: bytes as they are, all else as JSON. headers: None leaves out one that is sent otherwise.
        """
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        lines = {"X-Request-Id": self.new_id(), **self._authorization(), **(headers or {})}
        with closing(http.client.HTTPConnection(*self.server.address, timeout=60)) as connection:
            connection.request(method, path, data, {k: v for k, v in lines.items() if v is not None})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(self.server.address, timeout=60)

    def raw(self, data: bytes, *, half_close: bool = False) -> Reply:
        """Send bytes, read the last answer that is no mere announcement."""
        with self.connect() as sock:
            # A server may answer and hang up before it was told everything; its answer must be there all the same.
            with suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            return read_reply(sock)

    def head(self, path: str, extra: str = "", method: str = "POST") -> bytes:
        """The first lines of a request; the last header must still be ended."""
        return f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {self.new_id()}\r\n{extra}".encode()

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels; not through `send`, which would be seen in them."""
        with closing(http.client.HTTPConnection(*self.server.address, timeout=10)) as connection:
            connection.request("GET", "/metrics", headers=self._authorization())
            lines = connection.getresponse().read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def _authorization(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


def read_reply(sock: socket.socket) -> Reply:
    """One answer from a socket."""
    response = http.client.HTTPResponse(sock)
    response.begin()
    with closing(response):
        named = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, named, response.read())


def until(condition: Callable[[], bool], what: str, within_s: float = _SETTLE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.05)


@dataclass(frozen=True)
class _State:
    """What a process holds."""

    fds: int
    threads: int
    megabytes: float

    @classmethod
    def of(cls, process: psutil.Process) -> _State:
        return cls(process.num_fds(), process.num_threads(), _anonymous_mb(process.pid))

    def holds(self, before: _State) -> bool:
        return (
            self.fds <= before.fds + _MORE_FDS
            and self.threads <= before.threads + _MORE_THREADS
            and self.megabytes <= before.megabytes + _MORE_MB
        )


def _anonymous_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024


@dataclass(frozen=True)
class Baseline:
    """The server as it was at the beginning."""

    text: str
    free_pages: int
    front: _State
    engine: _State
    children: int


@contextmanager
def attack(*options: str, key: str | None = None, chats: bool = True) -> Iterator[tuple[Target, Baseline]]:
    """A server to be attacked, and what it is like before."""
    sizes = ("--max-queue", str(MAX_QUEUE), "--max-total-tokens", str(MAX_TOKENS))
    with running_server(*sizes, *options) as server:
        target = Target(server, key)
        text = target.send("/generate", CANARY).json["generated_text"]
        # Whatever is started when first needed is there before counting.
        if chats:
            assert target.send(CHAT, {"messages": MESSAGES, "max_tokens": 2}).status == 200
        for body in ({"inputs": "long " * 900}, {"inputs": "<|im_end|>"}):
            target.send("/tokenize", body)
        front = psutil.Process(server.process.pid)
        until(lambda: _engine(target)["running"] == 0, "the engine to be idle")
        yield (
            target,
            Baseline(
                text=text,
                free_pages=_engine(target)["free_pages"],
                front=_State.of(front),
                engine=_State.of(server.engine),
                children=len(front.children()),
            ),
        )


@contextmanager
def survived(target: Target, baseline: Baseline) -> Iterator[Target]:
    """Do what you like inside; afterwards the server must be as if nothing had been."""
    target.ids.clear()
    begun, read = target.metrics()["tgi_request_count"], len(target.server.log)
    yield target
    ids = list(target.ids)
    front = psutil.Process(target.server.process.pid)
    assert target.send("/health", method="GET").status == 200
    # A queue that is still being emptied may refuse the canary for a moment.
    until(lambda: _canary(target) == baseline.text, f"the canary to sing {baseline.text!r}")
    until(lambda: _is_idle(_engine(target), baseline), "an idle engine with all its pages")
    until(lambda: target.metrics()["tgi_requests_active"] == 0, "no request being answered")
    until(lambda: _State.of(front).holds(baseline.front), f"the front end as it was, {baseline.front}")
    until(lambda: _State.of(target.server.engine).holds(baseline.engine), f"the engine, {baseline.engine}")
    assert len(front.children()) == baseline.children
    until(lambda: all(target.server.log.count(f"id={one}\n") == 1 for one in ids), "one line a request")
    found = target.metrics()
    _check_counters(found)
    until(
        lambda: _generating(target.server.log[read:]) == found["tgi_request_count"] - begun,
        "each request to generate to be counted once",
    )
    log = target.server.log[read:]
    assert "Traceback" not in log
    assert "\x1b" not in log


@pytest.fixture(scope="module")
def attacked() -> Iterator[tuple[Target, Baseline]]:
    with attack() as both:
        yield both


@pytest.fixture
def target(attacked: tuple[Target, Baseline]) -> Iterator[Target]:
    """The server; after the test it must be as if nothing had been."""
    with survived(*attacked) as target:
        yield target


def _generating(log: str) -> int:
    """Requests to generate that the log tells of."""
    lines = re.findall(r"^\S+ \S+ INFO POST (\S+) .* id=\S+$", log, re.MULTILINE)
    return sum(path in GENERATING for path in lines)


def _canary(target: Target) -> str | None:
    """What the model always says; None while the queue is still being emptied."""
    reply = target.send("/generate", CANARY)
    assert reply.status in (200, 429), reply
    return str(reply.json["generated_text"]) if reply.status == 200 else None


def _engine(target: Target) -> dict[str, Any]:
    status = target.send("/info", method="GET").json["engine"]
    assert isinstance(status, dict)
    return status


def _is_idle(status: dict[str, Any], baseline: Baseline) -> bool:
    return status["running"] == status["waiting"] == 0 and status["free_pages"] == baseline.free_pages


def _check_counters(found: dict[str, float]) -> None:
    """Every request that was begun has ended in exactly one way."""
    failures = sum(value for name, value in found.items() if name.startswith("tgi_request_failure{"))
    assert found["tgi_request_count"] == found["tgi_request_success"] + failures


def check_error(path: str, reply: Reply, *statuses: int) -> str:
    """The message, after checking status and shape; nothing of the inside may show."""
    assert reply.status in statuses, (reply.status, reply.body[:300])
    error = reply.json
    if path.startswith("/v1/"):
        assert set(error["error"]) == {"message", "type", "param", "code"}
        message = str(error["error"]["message"])
    else:
        assert set(error) == {"error", "error_type"}
        message = str(error["error"])
    assert "Traceback" not in message and ".py" not in message and len(message) < 2000
    assert message.isprintable()
    return message


def raise_limit_of_files(wanted: int) -> None:
    """Let this process open `wanted` files; skips the test where that is not allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this process may open {hard} files, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, 4096), hard))
