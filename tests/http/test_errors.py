from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from yarl import URL

from tests.http.conftest import ALL, Start
from tests.http.fake_engine import FakeEngine
from tests.text.tiny import write_tiny_folder
from tgi_server.errors import STATUS, ErrorKind, Flavour, UserError
from tgi_server.text.text import Text

Say = Callable[..., FakeEngine]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
RETRIED = (ErrorKind.OVERLOADED, ErrorKind.WAITED, ErrorKind.UNAVAILABLE)


def check_shape(path: str, error: Any) -> str:
    """The message, if the body has the shape of the path's flavour."""
    if path.startswith("/v1/"):
        assert set(error) == {"error"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
        return str(error["error"]["message"])
    assert set(error) == {"error", "error_type"}
    return str(error["error"])


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


HUGE = 10**200  # more digits than any integer type has

TGI_INVALID = [
    ({}, "inputs"),
    ({"inputs": ""}, "inputs"),
    ({"inputs": None}, "inputs"),
    ({"inputs": ["a"]}, "inputs"),
    ({"inputs": "x", "parameters": []}, "parameters"),
    *(
        ({"inputs": "x", "parameters": {field: value}}, f"parameters.{field}")
        for field, values in {
            "max_new_tokens": (0, -1, 10**9, 2**31, 2**63, HUGE, 1.5, "5", True, []),
            "temperature": (-1, 1e9, "hot", HUGE, True),
            "top_k": (-2, 2**31, 0.5, "x"),
            "top_p": (0, 1.1, -0.5),
            "typical_p": (0, 1.1),
            "repetition_penalty": (0, -1, 1e38),
            "frequency_penalty": (-2.1, 2.1, 1e38),
            "best_of": (0, 3, 1_000_000),
            "seed": (-1, 2**64, "x", HUGE),
            "stop": (5, [""], [1], ["a"] * 5, ["a" * 10_000], {}),
            "truncate": (0, -1, 200, HUGE),
            "top_n_tokens": (-1, 6, 10**6),
            "details": ("yes", 1),
            "do_sample": ("yes", 0),
            "watermark": ("yes",),
            "grammar": ({"type": "regex", "value": "a"},),
            "adapter_id": ("other",),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(("body", "field"), TGI_INVALID, ids=lambda value: str(value)[:60])
async def test_tgi_fields_out_of_bounds_are_a_422_that_names_them(
    start: Start, say: Say, path: str, body: object, field: str
) -> None:
    engine = say("a")
    client = await start(engine, honoured=ALL)
    response = await client.post(path, json=body)
    assert response.status == 422, await response.text()
    error = await response.json()
    assert error["error_type"] == "validation"
    assert check_shape(path, error).startswith(field)
    assert not engine.requests


MANY = {str(i): 0 for i in range(2000)}
OPENAI_INVALID = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    *(
        ({field: value}, field)
        for field, values in {
            "max_tokens": (0, -1, 10**9, 2**63, HUGE, 1.5, "5", True),
            "temperature": (-1, 1e9, "hot"),
            "top_p": (0, 1.1),
            "top_k": (-2, 0.5),
            "min_p": (-0.1, 2),
            "frequency_penalty": (-3, 3),
            "presence_penalty": (-3, 1e38),
            "repetition_penalty": (0, 1e38),
            "n": (0, 9, 17, 1_000_000),
            "stop": (5, [""], "", ["a"] * 65, ["a"] * 100_000),
            "stop_token_ids": ([300], [-1], [2**31], ["x"], 5),
            "seed": (2**64, "x"),
            "top_logprobs": (-1, 21, 5),
            "logprobs": (5, "yes"),
            "logit_bias": ({"abc": 1}, {"300": 1}, {"1": 1e9}, {"-1": 1}, MANY, [1], 5),
            "min_tokens": (-1, 2**31),
            "stream": ("yes", 1),
            "stream_options": ({"include_usage": True},),
            "tools": ([{"type": "function"}], 5),
            "tool_choice": ("required",),
            "response_format": ({"type": "json_object"},),
            "chat_template": ("{{ 1 }}",),
            "chat_template_kwargs": ({"messages": []}, {"tokenize": True}, {"bos_token": "x"}, 5),
            "use_beam_search": (True,),
            "length_penalty": (2,),
            "skip_special_tokens": (False,),
            "truncate_prompt_tokens": (5,),
            "bad_words": (["x"],),
            "adapter_id": ("x",),
            "grammar": ({"type": "json", "value": {}},),
        }.items()
        for value in values
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), OPENAI_INVALID, ids=lambda value: str(value)[:60])
async def test_openai_fields_out_of_bounds_are_a_400_that_names_them(
    start: Start, say: Say, body: dict[str, object], field: str
) -> None:
    engine = say("a")
    client = await start(engine, honoured=ALL)
    began = time.monotonic()
    response = await client.post(CHAT, json={"messages": MESSAGES, **body})
    assert response.status == 400, await response.text()
    error = await response.json()
    assert check_shape(CHAT, error)
    assert error["error"]["param"].startswith(field)
    assert error["error"]["type"] == "invalid_request_error"
    assert not engine.requests
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/generate", "parameters.do_sample", True),
        ("/generate", "parameters.temperature", 0.7),
        ("/generate", "parameters.top_k", 5),
        ("/generate", "parameters.watermark", True),
        ("/generate", "parameters.decoder_input_details", True),
        (CHAT, "temperature", 0.7),
        (CHAT, "presence_penalty", 1),
        (CHAT, "logit_bias", {"1": 5}),
        (CHAT, "min_tokens", 3),
    ],
)
async def test_a_field_the_engine_does_not_act_on_is_refused_by_name(
    start: Start, say: Say, path: str, field: str, value: object
) -> None:
    client = await start(say("a"), honoured=frozenset())
    name = field.rpartition(".")[2]
    body = {"inputs": "x", "parameters": {name: value}, "messages": MESSAGES, name: value}
    response = await client.post(path, json=body)
    assert response.status in (400, 422)
    message = check_shape(path, await response.json())
    assert message.startswith(f"{field} is ")
    assert "does not support yet" in message


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


@pytest.mark.parametrize(
    "parameters",
    [{"best_of": 2}, {"best_of": 2, "do_sample": True, "seed": 1}],
    ids=["greedy", "seeded"],
)
async def test_best_of_needs_answers_that_differ(start: Start, say: Say, parameters: object) -> None:
    client = await start(say("a"), honoured=ALL)
    response = await client.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert response.status == 422
    assert (await response.json())["error"].startswith("parameters.best_of")


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}])
async def test_what_a_stream_cannot_give_is_refused_before_it_starts(
    start: Start, say: Say, parameters: object
) -> None:
    client = await start(say("a"), honoured=ALL)
    response = await client.post("/generate_stream", json={"inputs": "x", "parameters": parameters})
    assert response.status == 422
    assert "cannot be used in a stream" in (await response.json())["error"]
