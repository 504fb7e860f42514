from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from yarl import URL

from tests.http.conftest import Start
from tests.http.error_shape import check_shape
from tests.http.fake_engine import FakeEngine
from tests.text.tiny import write_tiny_folder
from tgi_server.errors import STATUS, ErrorKind, Flavour, UserError
from tgi_server.text.text import Text

Say = Callable[..., FakeEngine]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
RETRIED = (ErrorKind.OVERLOADED, ErrorKind.WAITED, ErrorKind.UNAVAILABLE)


DAMAGED = {
    "empty": b"",
    "blank": b"  \n",
    "cut off": b'{"model":',
    "array": b"[]",
    "string": b'"x"',
    "number": b"42",
    "null": b"null",
    "true": b"true",
    "two documents": b"{} {}",
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": Infinity}',
    "1e400": b'{"temperature": 1e400}',
    "5000 digits": b'{"max_tokens": ' + b"1" * 5000 + b"}",
    "not UTF-8": b'{"inputs": "\xff"}',
    "overlong": b'{"inputs": "\xc0\xaf"}',
    "UTF-16": '{"inputs": "x"}'.encode("utf-16"),
    "lone surrogate": b'{"inputs": "\\ud800"}',
    "raw control": b'{"inputs": "\x00"}',
}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", CHAT])
@pytest.mark.parametrize("name", DAMAGED)
async def test_a_body_that_is_no_json_object_is_a_400(start: Start, say: Say, path: str, name: str) -> None:
    client = await start(say("a"))
    began = time.monotonic()
    response = await client.post(path, data=DAMAGED[name])
    assert response.status == 400
    assert check_shape(path, await response.json())
    assert time.monotonic() - began < 0.5
    assert response.headers["X-Request-Id"]


async def test_a_byte_order_mark_and_another_content_type_are_no_obstacle(start: Start, say: Say) -> None:
    client = await start(say("a"))
    data = b'\xef\xbb\xbf{"inputs": "x"}'
    response = await client.post("/generate", data=data, headers={"Content-Type": "text/plain"})
    assert response.status == 200


async def test_of_a_key_given_twice_the_last_counts(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine)
    data = b'{"inputs": "x", "parameters": {"max_new_tokens": 5, "max_new_tokens": 6}}'
    await client.post("/generate", data=data)
    assert engine.requests[0].max_new_tokens == 6


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(start: Start, say: Say) -> None:
    client = await start(say("a"))
    response = await client.post("/generate", json={"inputs": "x" * 199})
    assert response.status == 422
    message = (await response.json())["error"]
    assert "200 tokens" in message
    assert "199 at most" in message


@pytest.mark.parametrize(("more", "status"), [(99, 200), (100, 200), (101, 422)])
async def test_prompt_and_answer_may_fill_the_context_exactly(
    start: Start, say: Say, more: int, status: int
) -> None:
    client = await start(say("a"))
    body = {"inputs": "x" * 99, "parameters": {"max_new_tokens": more}}
    response = await client.post("/generate", json=body)
    assert response.status == status
    if status != 200:
        message = (await response.json())["error"]
        assert "100 tokens, 201 together" in message
        assert "at most 200" in message


async def test_ten_million_characters_are_refused_before_they_are_encoded(start: Start, say: Say) -> None:
    client = await start(say("a"), payload_limit_bytes=20_000_000)
    began = time.monotonic()
    response = await client.post("/generate", json={"inputs": "x" * 10_000_000})
    assert response.status == 422
    assert "10000000 characters" in (await response.json())["error"]
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "x" * 100_000, "a\r\nb\x1b"])
async def test_an_unknown_model_is_a_404_that_does_not_echo_it_raw(start: Start, say: Say, name: str) -> None:
    client = await start(say("a"))
    response = await client.post(CHAT, json={"model": name, "messages": MESSAGES})
    assert response.status == 404
    message = check_shape(CHAT, await response.json())
    assert len(message) < 200
    assert message.isprintable()


async def test_chat_on_a_model_without_a_template_says_how_to_set_one(
    start: Start, say: Say, tmp_path: Any
) -> None:
    client = await start(say("a"), text=Text.from_folder(write_tiny_folder(tmp_path, template=None)))
    response = await client.post(CHAT, json={"messages": MESSAGES})
    assert response.status == 400
    assert "chat_template.jinja" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", CHAT, "stream"])
@pytest.mark.parametrize("kind", [kind for kind in ErrorKind if kind is not ErrorKind.METHOD_NOT_ALLOWED])
async def test_an_error_before_the_first_token_has_its_status_also_in_a_stream(
    start: Start, say: Say, kind: ErrorKind, path: str
) -> None:
    client = await start(say("a", fail_at=0, failure=UserError(kind, "because")))
    body = {"inputs": "x", "messages": MESSAGES, "stream": path == "stream"}
    path = CHAT if path == "stream" else path
    flavour = Flavour.OPENAI if path == CHAT else Flavour.TGI
    response = await client.post(path, json=body)
    status, word = STATUS[kind][flavour]
    assert response.status == status
    error = await response.json()
    assert check_shape(path, error) == "because"
    assert word == (error["error"]["type"] if path == CHAT else error["error_type"])
    assert ("Retry-After" in response.headers) == (kind in RETRIED)
    assert ("WWW-Authenticate" in response.headers) == (kind is ErrorKind.UNAUTHORIZED)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_defect_of_ours_is_a_500_with_an_id_and_no_details(
    start: Start, say: Say, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start(say("a", fail_at=0, failure=RuntimeError("secret /srv/path")))
    response = await client.post(
        CHAT, json={"messages": MESSAGES, "stream": stream}, headers={"X-Request-Id": "call-7"}
    )
    assert response.status == 500
    message = check_shape(CHAT, await response.json())
    assert "call-7" in message
    assert "secret" not in message
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/generate", 405, "POST"),
        ("POST", "/health", 405, "GET"),
        ("DELETE", CHAT, 405, "POST"),
        ("GET", "/nowhere", 404, None),
        ("POST", "/generate/", 404, None),
        ("POST", "//generate", 404, None),
        ("POST", "/v1/nowhere", 404, None),
        ("POST", "/v1/chat%2Fcompletions", 404, None),
    ],
)
async def test_wrong_methods_and_paths_get_json(
    start: Start, say: Say, method: str, path: str, status: int, allow: str | None
) -> None:
    client = await start(say("a"))
    root = f"http://{client.server.host}:{client.server.port}"
    response = await client.session.request(method, URL(root + path, encoded=True))
    assert response.status == status
    check_shape(path, await response.json())
    assert (allow in response.headers["Allow"]) if allow else "Allow" not in response.headers


@pytest.mark.parametrize("path", ["/generate", CHAT])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_a_413(start: Start, say: Say, path: str, chunked: bool) -> None:
    client = await start(say("a"), payload_limit_bytes=1000)

    async def chunks() -> Any:
        for _ in range(30):
            yield b"x" * 100

    response = await client.post(path, data=chunks() if chunked else b"x" * 3000)
    assert response.status == 413
    assert "1000 bytes" in check_shape(path, await response.json())


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)],
)
async def test_a_request_id_is_echoed_if_it_is_short_and_plain(
    start: Start, say: Say, sent: str, echoed: bool
) -> None:
    client = await start(say("a"))
    for path, body in (
        ("/generate", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/nowhere", {}),
    ):
        response = await client.post(path, json=body, headers={"X-Request-Id": sent})
        assert (response.headers["X-Request-Id"] == sent) == echoed
        assert response.headers["X-Request-Id"]


async def test_every_request_leaves_one_line_in_the_log(
    start: Start, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tgi_server")
    client = await start(say("a"))
    await client.get("/a%0d%0aforged", headers={"X-Request-Id": "line-1"})
    (record,) = [record for record in caplog.records if "line-1" in record.getMessage()]
    assert "404" in record.getMessage()
    assert record.getMessage().isprintable()
