"""Fields of a request: what is out of bounds, or not acted on, is refused by name."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.http.conftest import ALL, Start
from tests.http.error_shape import check_shape
from tests.http.fake_engine import FakeEngine

Say = Callable[..., FakeEngine]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
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
