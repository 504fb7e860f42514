"""Too much at once. Numbers are rows of `docs/faults.md`."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

from tests.faults.conftest import CANARY, MAX_QUEUE, MAX_TOKENS, Target, attack, check_error, survived, until
from tgi_server.config import PAGE_TOKENS

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": MAX_TOKENS - 24}}


def begin(target: Target, path: str, body: object) -> socket.socket:
    """Send a request and leave its answer unread."""
    data = json.dumps(body).encode()
    sock = target.connect()
    sock.sendall(target.head(path, f"Content-Length: {len(data)}\r\n\r\n") + data)
    return sock


def test_row_71_a_full_queue(target: Target) -> None:
    streams = [begin(target, "/generate_stream", LONG) for _ in range(MAX_QUEUE)]
    try:
        for sock in streams:
            assert b"200 OK" in sock.recv(1000)
        for path in ("/generate", "/generate_stream"):
            reply = target.send(path, CANARY)
            check_error(path, reply, 429)
            assert int(reply.headers["retry-after"]) >= 1
        for path in ("/health", "/livez"):
            assert target.send(path, method="GET").status == 200
        # The engine tells of its queue every half second.
        until(lambda: target.send("/readyz", method="GET").status == 503, "not to be ready for more")
        assert all(b"data:" in sock.recv(1000) for sock in streams), "those accepted go on"
        assert target.metrics()['tgi_request_rejections_total{reason="overloaded"}'] >= 2
    finally:
        for sock in streams:
            sock.close()


def arrivals(target: Target, body: object) -> list[float]:
    """When each event of a stream came."""
    with begin(target, "/generate_stream", body) as sock, sock.makefile("rb") as lines:
        times = []
        for line in lines:
            if line.startswith(b"data:"):
                times.append(time.monotonic())
            if b'"generated_text":"' in line:
                break
        return times


def test_row_73_long_prompts_among_short_streams_do_not_stop_them(target: Target) -> None:
    short = {"inputs": "Count: one, two,", "parameters": {"max_new_tokens": 120}}
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(arrivals, target, short) for _ in range(12)]
        for token in (
            5,
            6,
            7,
        ):  # three, so that steps of whole prompts would be more than one gap in a hundred
            long = {"prompt": [token] * (MAX_TOKENS - 2), "max_tokens": 1}
            assert target.send("/v1/completions", long).status == 200
        seen = [stream.result() for stream in streams]
    gaps = sorted(later - sooner for times in seen for sooner, later in pairwise(times))
    assert len(gaps) == 12 * 119
    p99, mean = gaps[len(gaps) * 99 // 100], sum(gaps) / len(gaps)
    assert p99 < 8 * mean, f"99 % of gaps are below {p99:.3f} s, and their mean is {mean:.3f} s"


def test_row_73_answers_are_the_same_beside_a_long_prompt(target: Target) -> None:
    short = {"inputs": "Count: one, two,", "parameters": {"max_new_tokens": 16}}
    with ThreadPoolExecutor(12) as pool:
        alone = target.send("/generate", short).json["generated_text"]
        streams = [pool.submit(target.send, "/generate", short) for _ in range(10)]
        long = pool.submit(
            target.send, "/v1/completions", {"prompt": [8] * (MAX_TOKENS - 2), "max_tokens": 1}
        )
        assert {future.result().json["generated_text"] for future in streams} == {alone}
        assert long.result().status == 200


def test_row_75_a_herd_with_one_prompt() -> None:
    with attack() as attacked, survived(*attacked) as target:
        body = {"inputs": "All of us ask the same. " * 60, "parameters": {"max_new_tokens": 8}}
        prompt_tokens = len(target.send("/tokenize", {"inputs": body["inputs"]}).json)
        before = settled(target)
        with ThreadPoolExecutor(MAX_QUEUE) as pool:
            replies = pool.map(lambda _: target.send("/generate", body), range(MAX_QUEUE))
            texts = [reply.json["generated_text"] for reply in replies]
        after = settled(target)
    assert len(set(texts)) == 1
    asked, found = (after[name] - before[name] for name in ("prompt_tokens", "prefix_hit_tokens"))
    assert asked == MAX_QUEUE * prompt_tokens, "nothing but the herd was counted"
    computed, last_page = asked - found, PAGE_TOKENS  # which each has for itself
    assert computed <= prompt_tokens + MAX_QUEUE * last_page, f"{computed} of {asked} prompt tokens"


def settled(target: Target) -> dict[str, int]:
    """What the engine has counted, all requests answered so far included: it tells every half second."""
    time.sleep(1.0)
    return target.server.get("/info")["engine"]


def test_row_76_half_of_the_clients_leave(target: Target) -> None:
    chance = random.Random(76)

    def visit(i: int) -> None:
        path = chance.choice(["/generate", "/generate_stream"])
        body = {"inputs": f"Visitor {i}", "parameters": {"max_new_tokens": chance.randint(2, 30)}}
        if chance.random() < 0.5:
            with begin(target, path, body) as sock, suppress(ConnectionError):
                time.sleep(chance.random() * 0.2)
                sock.setblocking(False)
                with suppress(BlockingIOError):
                    sock.recv(500)
        else:
            assert target.send(path, body).status == 200

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(visit, range(150)):
            pass
    found = target.metrics()
    until(lambda: target.metrics()["tgi_requests_active"] == 0, "every visitor to be gone")
    assert found["tgi_request_aborts_total"] > 10
