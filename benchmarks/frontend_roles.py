"""The two processes `benchmarks.frontend` measures with: `engine`, a stub, and `front`, the real front end.

Each has its end of the channel as standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import sys
import time
from pathlib import Path

import uvloop
from aiohttp import web

from tgi_server.config import ServerConfig
from tgi_server.engine.channel import Channel, PeerGone
from tgi_server.engine.client import EngineClient
from tgi_server.engine.request import Cancel, EngineStatus, FinishReason, StepEvents, TokenEvent
from tgi_server.http.app import make_app
from tgi_server.http.transport import make_runner
from tgi_server.logs import logging_to_stderr
from tgi_server.text.text import Text

MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def engine_role() -> None:
    """Gives every request a token a step, as fast as the front end takes them."""
    sock = socket.socket(fileno=sys.stdin.fileno())
    channel = Channel(sock)
    left: dict[str, int] = {}
    told_at = 0.0
    with contextlib.suppress(PeerGone):
        while True:
            for message in channel.receive(0.0 if left else 0.1):
                if isinstance(message, Cancel):
                    left.pop(message.id, None)
                else:
                    left[message.id] = message.max_new_tokens
            if time.monotonic() - told_at > 0.5:
                told_at = time.monotonic()
                channel.send(EngineStatus(phase="ready", running=len(left), total_pages=1))
            select.select([], [sock], [], 1.0)
            events = []
            for name in list(left):
                left[name] -= 1
                finish = None if left[name] else FinishReason.LENGTH
                events.append(TokenEvent(name, [1000 + left[name]], [-0.5], finish, queued_s=0.0))
                if finish:
                    del left[name]
            if events:
                channel.send(StepEvents(events))


async def front_role() -> None:
    """The application as the service runs it; prints its port."""
    client = await EngineClient.connect(socket.socket(fileno=sys.stdin.fileno()))
    await client.wait_ready()
    config = ServerConfig(MODEL, "model", "127.0.0.1", 0, 4096, 1000)
    runner = make_runner(make_app(config, client, Text.from_folder(MODEL)))
    await runner.setup()
    await web.TCPSite(runner, config.host, config.port).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        engine_role()
    else:
        with logging_to_stderr("info", as_json=False):
            uvloop.run(front_role())
