from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine
from tgi_server.config import ServerConfig
from tgi_server.http.keys import ACCESS, Access, Keys, check_key
from tgi_server.http.metrics import Metrics
from tgi_server.http.middleware import guard
from tgi_server.http.state import CONFIG, LIFE, METRICS, Life

Say = Callable[..., FakeEngine]


async def test_every_route_is_in_the_table_and_nothing_else(start: Start, say: Say) -> None:
    client = await start(say("a"))
    routes = {
        (route.method, route.resource.canonical)
        for route in client.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert routes == set(ACCESS)


async def test_without_keys_every_route_is_open(start: Start, say: Say) -> None:
    client = await start(say("a"))
    assert (await client.get("/info")).status == 200


@pytest.mark.parametrize(("method", "path"), sorted(ACCESS))
async def test_only_probes_answer_without_a_key(start: Start, say: Say, method: str, path: str) -> None:
    client = await start(say("a"), api_keys=("right",))
    response = await client.request(method, path)
    if ACCESS[method, path] is Access.OPEN:
        assert response.status == 200
        return
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = (await response.json())["error"]
    message = error["message"] if path.startswith("/v1/") else error
    assert "Authorization: Bearer" in message


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer Right"},
        {"Authorization": "Bearer right2"},
        {"Authorization": "Basic right"},
        {"Authorization": "right"},
        {"Authorization": "Bearer é"},
        {"x-api-key": "right"},
    ],
)
async def test_what_is_no_key_opens_nothing(start: Start, say: Say, headers: dict[str, str]) -> None:
    client = await start(say("a"), api_keys=("right", "other"))
    assert (await client.get("/info", headers=headers)).status == 401


async def test_two_authorization_headers_open_nothing(start: Start, say: Say) -> None:
    client = await start(say("a"), api_keys=("right",))
    headers = [("Authorization", "Bearer right"), ("Authorization", "Bearer wrong")]
    assert (await client.get("/info", headers=headers)).status == 401


@pytest.mark.parametrize("key", ["right", "other", "boss"])
async def test_every_key_opens_user_routes(start: Start, say: Say, key: str) -> None:
    client = await start(say("a"), api_keys=("right", "other"), admin_keys=("boss",))
    headers = {"Authorization": f"bearer {key}"}
    assert (await client.post("/generate", json={"inputs": "x"}, headers=headers)).status == 200


async def test_a_route_missing_in_the_table_needs_an_administrators_key() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    access = check_key(Keys(("right",), ("boss",)))
    app = web.Application(middlewares=[guard, access])
    app[CONFIG] = ServerConfig(Path("m"), "m", "h", 1, 1, 1)
    app[METRICS], app[LIFE] = Metrics(1), Life()
    app.router.add_get("/new", answer)
    async with TestClient(TestServer(app)) as client:
        for key, status in (("wrong", 401), ("right", 403), ("boss", 200)):
            response = await client.get("/new", headers={"Authorization": f"Bearer {key}"})
            assert response.status == status


@pytest.mark.parametrize(
    "path",
    ["//info", "/./info", "/v1/../info", "/%69nfo", "/info?a=/health", "/info#/health", "/INFO", "/info/"],
)
@pytest.mark.parametrize("host", ["x/health?", "a#@b", "127.0.0.1"])
async def test_no_spelling_of_a_path_or_host_goes_round_the_key(
    start: Start, say: Say, path: str, host: str
) -> None:
    client = await start(say("a"), api_keys=("right",))
    url = URL(f"http://{client.server.host}:{client.server.port}{path}", encoded=True)
    assert (await client.session.get(url, headers={"Host": host})).status == 401


def test_keys_do_not_show_when_the_configuration_is_printed() -> None:
    config = ServerConfig(Path("m"), "m", "h", 1, 1, 1, api_keys=("secret",), admin_keys=("secret",))
    assert "secret" not in repr(config)
