"""What the document says is what the server does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient

from tests.http.conftest import ALL, Start
from tests.http.events import read_events
from tests.http.fake_engine import FakeEngine
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.keys import ACCESS

Say = Callable[..., FakeEngine]
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

EVERYTHING = {
    "/generate": [
        {"inputs": "x"},
        {
            "inputs": "x",
            "parameters": {
                "details": True,
                "decoder_input_details": True,
                "top_n_tokens": 2,
                "do_sample": True,
            },
        },
        {"inputs": "x", "parameters": {"details": True, "best_of": 2, "do_sample": True, "top_n_tokens": 1}},
    ],
    "/generate_stream": [
        {"inputs": "x"},
        {"inputs": "x", "parameters": {"details": True, "top_n_tokens": 2, "do_sample": True, "seed": 5}},
    ],
    "/": [{"inputs": "x"}, {"inputs": "x", "stream": True}],
    CHAT: [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "n": 2, "return_token_ids": True},
        {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": MESSAGES, "stream": True, "logprobs": True, "top_logprobs": 1},
    ],
    COMPLETIONS: [
        {"prompt": "x"},
        {"prompt": ["x", "y"], "logprobs": 2, "echo": True, "return_token_ids": True},
        {"prompt": "x", "logprobs": 0},
        {"prompt": [5, 6], "stream": True, "logprobs": 1, "stream_options": {"include_usage": True}},
    ],
    "/invocations": [{"inputs": "x"}, {"messages": MESSAGES}, {"prompt": "x"}],
    "/vertex": [{"instances": [{"inputs": "x"}, {"messages": MESSAGES}]}],
    "/tokenize": [{"inputs": "hé"}],
    "/detokenize": [{"tokens": [1, 2]}],
    "/chat_tokenize": [{"messages": MESSAGES}],
}


async def described(client: TestClient) -> dict[str, Any]:
    return dict(await (await client.get("/openapi.json")).json())


def check(api: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    jsonschema.Draft202012Validator({**schema, "components": api["components"]}).validate(value)


async def check_answer(
    api: dict[str, Any], path: str, response: ClientResponse, method: str = "post"
) -> None:
    """Status, content type and body are among those the document lists."""
    described = api["paths"][path][method]["responses"]
    assert str(response.status) in described, (response.status, await response.text())
    content = described[str(response.status)].get("content", {})
    if not content:
        assert not await response.read()
        return
    schema = content[response.content_type]["schema"]
    if response.content_type == "text/event-stream":
        for event in await read_events(response):
            if event != "[DONE]":
                check(api, schema, event)
    elif response.content_type == "application/json":
        check(api, schema, await response.json())


async def test_the_document_itself_is_well_formed(start: Start, say: Say) -> None:
    api = await described(await start(say("a")))
    assert api["openapi"] == "3.1.0"
    for schema in api["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    names = set(api["components"]["schemas"])
    text = json.dumps(api)
    assert all(f'"#/components/schemas/{name}"' in text for name in names - {"Error"}), "each is used"
    assert set(part.split('"')[0] for part in text.split("#/components/schemas/")[1:]) <= names


async def test_it_has_every_route_and_nothing_else(start: Start, say: Say) -> None:
    api = await described(await start(say("a")))
    routes = {(method.upper(), path) for path, methods in api["paths"].items() for method in methods}
    assert routes == set(ACCESS)


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in EVERYTHING.items() for body in bodies]
)
async def test_answers_have_the_shapes_it_promises(
    start: Start, say: Say, path: str, body: dict[str, Any]
) -> None:
    client = await start(say("hello wé"), honoured=ALL)
    api = await described(client)
    check(api, api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], body)
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    await check_answer(api, path, response)


@pytest.mark.parametrize("path", [path for method, path in ACCESS if method == "GET"])
async def test_what_is_only_read_has_the_shape_it_promises(start: Start, say: Say, path: str) -> None:
    client = await start(say("a"))
    await check_answer(await described(client), path, await client.get(path), "get")


@pytest.mark.parametrize("path", EVERYTHING)
@pytest.mark.parametrize(
    "data", [b"{", b"{}", b'{"inputs": 5, "messages": 5, "prompt": {}}', b"x" * 3_000_000]
)
async def test_errors_have_the_shapes_it_promises(start: Start, say: Say, path: str, data: bytes) -> None:
    client = await start(say("a"))
    response = await client.post(path, data=data)
    assert response.status >= 400
    if path != "/invocations":  # its errors have the shape of the request it was taken for
        await check_answer(await described(client), path, response)


@pytest.mark.parametrize("kind", [ErrorKind.OVERLOADED, ErrorKind.GENERATION, ErrorKind.UNAVAILABLE])
@pytest.mark.parametrize("path", ["/generate", CHAT])
async def test_failures_have_the_shapes_it_promises(
    start: Start, say: Say, kind: ErrorKind, path: str
) -> None:
    client = await start(say("a", fail_at=0, failure=UserError(kind, "because")))
    response = await client.post(path, json={"inputs": "x", "messages": MESSAGES})
    await check_answer(await described(client), path, response)


@pytest.mark.parametrize(
    ("path", "name", "given"),
    [
        ("/generate", "GenerateRequest", {"inputs": "x"}),
        ("/", "CompatGenerateRequest", {"inputs": "x"}),
        (CHAT, "ChatRequest", {"messages": MESSAGES}),
        (COMPLETIONS, "CompletionRequest", {"prompt": "x"}),
        ("/tokenize", "TokenizeRequest", {"inputs": "x"}),
        ("/detokenize", "DetokenizeRequest", {"tokens": [1]}),
    ],
)
async def test_every_field_it_lists_is_read(
    start: Start, say: Say, path: str, name: str, given: dict[str, Any]
) -> None:
    client = await start(say("a"))
    schemas = (await described(client))["components"]["schemas"]
    body: dict[str, Any] = {**dict.fromkeys(schemas[name]["properties"]), **given}
    if "GenerateParameters" in json.dumps(schemas[name]):
        body["parameters"] = dict.fromkeys(schemas["GenerateParameters"]["properties"])
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    assert "x-tgi-ignored-fields" not in response.headers


async def test_the_page_for_people_loads_nothing(start: Start, say: Say) -> None:
    response = await (await start(say("a"))).get("/docs")
    page = await response.text()
    assert response.content_type == "text/html"
    assert all(path in page for _, path in ACCESS)
    assert "<script" not in page and "http://" not in page and "https://" not in page
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
