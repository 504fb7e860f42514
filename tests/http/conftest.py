from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from tests.http.fake_engine import FakeEngine
from tests.text.tiny import write_tiny_folder
from tgi_server.config import ServerConfig
from tgi_server.engine.request import HONOURED, GenerationRequest, Sampling
from tgi_server.http.app import make_app
from tgi_server.http.spans import Tracer
from tgi_server.http.state import Patience
from tgi_server.http.transport import make_runner
from tgi_server.text.text import Text

Start = Callable[..., Awaitable[TestClient]]


class Served(TestServer):
    """The application on a port, over the connections it has in service."""

    async def _make_runner(self, **_: object) -> web.AppRunner:
        return make_runner(self.app)


ALL = frozenset(GenerationRequest.__struct_fields__ + Sampling.__struct_fields__)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Connections are tried on both loops: they differ in what a client that hangs up looks like."""
    loops = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return loops if item.path.stem == "test_transport" else {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.from_folder(write_tiny_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def say(text: Text) -> Callable[..., FakeEngine]:
    """A fake engine that says a text: `say("hello", burst=2)`."""

    def make(words: str, **settings: Any) -> FakeEngine:
        script = text.tokenizer.encode_batch([words], add_special_tokens=False)[0]
        return FakeEngine(script=script, **settings)

    return make


@pytest.fixture
def choose(text: Text) -> Callable[..., FakeEngine]:
    """A fake engine with a text and its tokens' logprob for each choice: `choose(("a", -2.0), ("b", -1.0))`."""

    def make(*choices: tuple[str, float]) -> FakeEngine:
        scripts = text.tokenizer.encode_batch([words for words, _ in choices], add_special_tokens=False)
        logprobs = (logprob for _, logprob in choices)
        return FakeEngine(choices=list(zip(scripts, logprobs, strict=True)))

    return make


@pytest.fixture
async def start(text: Text) -> AsyncIterator[Start]:
    """Serve a fake engine; returns a client. `text`, `config` fields, `patience`, `honoured` may be given."""
    clients: list[TestClient] = []

    async def make(
        engine: FakeEngine,
        *,
        text: Text = text,
        patience: Patience | None = None,
        honoured: frozenset[str] = HONOURED,
        tracer: Tracer | None = None,
        **config: Any,
    ) -> TestClient:
        settings = {
            "model": Path("/nowhere"),
            "model_id": "tiny",
            "host": "127.0.0.1",
            "port": 0,
            "max_total_tokens": 200,
            "max_queue": 8,
            **config,
        }
        app = make_app(
            ServerConfig(**settings), engine, text, patience=patience, honoured=honoured, tracer=tracer
        )
        server = Served(app)
        await server.start_server()
        client = TestClient(server)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()
