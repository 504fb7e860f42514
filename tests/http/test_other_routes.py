from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.http.conftest import Start
from tests.http.events import read_events
from tests.http.fake_engine import FakeEngine
from tests.text.tiny import BOS

Say = Callable[..., FakeEngine]
MESSAGES = [{"role": "user", "content": "hello"}]


async def test_tokens_come_with_their_text_and_bytes(start: Start, say: Say) -> None:
    client = await start(say("a"))
    response = await client.post("/tokenize", json={"inputs": "hello é w", "parameters": {"top_k": "any"}})
    assert await response.json() == [
        {"id": BOS, "text": "", "start": 0, "stop": 0},
        {"id": 263, "text": "hello", "start": 0, "stop": 5},
        {"id": 220, "text": " ", "start": 5, "stop": 6},
        {"id": 127, "text": "é", "start": 6, "stop": 8},
        {"id": 102, "text": "é", "start": 6, "stop": 8},
        {"id": 264, "text": " w", "start": 8, "stop": 10},
    ]


async def test_tokens_become_text_again(start: Start, say: Say) -> None:
    client = await start(say("a"))
    tokens = await (await client.post("/tokenize", json={"inputs": "hello é w"})).json()
    response = await client.post("/detokenize", json={"tokens": [token["id"] for token in tokens]})
    assert await response.json() == {"prompt": "<|bos|>hello é w"}


@pytest.mark.parametrize("body", [{}, {"tokens": []}, {"tokens": [300]}, {"tokens": "x"}, {"tokens": [1.5]}])
async def test_detokenize_names_what_is_wrong(start: Start, say: Say, body: object) -> None:
    client = await start(say("a"))
    response = await client.post("/detokenize", json=body)
    assert response.status == 422
    assert (await response.json())["error"].startswith("tokens")


async def test_a_chats_prompt_can_be_looked_at(start: Start, say: Say) -> None:
    client = await start(say("a"))
    answer = await (await client.post("/chat_tokenize", json={"messages": MESSAGES})).json()
    assert answer["templated_text"] == "<|bos|><|user|>hello<|end|><|assistant|>"
    assert [token["id"] for token in answer["tokenize_response"]] == [256, 258, 263, 257, 259]


async def test_the_root_answers_as_an_array_with_the_full_text(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    assert await (await client.post("/", json={"inputs": "x "})).json() == [{"generated_text": "x hello"}]
    body = {"inputs": "x ", "parameters": {"return_full_text": False}}
    assert await (await client.post("/", json=body)).json() == [{"generated_text": "hello"}]


async def test_the_root_streams_if_the_body_says_so(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    events = await read_events(await client.post("/", json={"inputs": "x", "stream": True}))
    assert events[-1]["generated_text"] == "xhello"


async def test_invocations_take_all_three_requests(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    generated = await (await client.post("/invocations", json={"inputs": "x"})).json()
    assert generated == [{"generated_text": "xhello"}]
    chat = await (await client.post("/invocations", json={"messages": MESSAGES})).json()
    assert chat["object"] == "chat.completion"
    completion = await (await client.post("/invocations", json={"prompt": "x"})).json()
    assert completion["object"] == "text_completion"


async def test_invocations_answer_errors_in_the_requests_flavour(start: Start, say: Say) -> None:
    client = await start(say("a"))
    response = await client.post("/invocations", json={"messages": MESSAGES, "max_tokens": 0})
    assert response.status == 400
    assert (await response.json())["error"]["param"] == "max_tokens"
    response = await client.post("/invocations", json={})
    assert response.status == 422
    assert "error_type" in await response.json()


async def test_vertex_predicts_every_instance_in_order(start: Start, say: Say) -> None:
    client = await start(say("hello world"))
    instances = [
        {"inputs": "x", "parameters": {"max_new_tokens": 1}},
        {"messages": MESSAGES, "max_tokens": 2},
    ]
    response = await client.post("/vertex", json={"instances": instances})
    assert await response.json() == {"predictions": ["hello", "hello w"]}


async def test_vertex_predicts_the_likeliest_of_an_instances_answers(start: Start, choose: Say) -> None:
    client = await start(choose(("less", -0.9), ("more", -0.8)))
    asked = {"best_of": 2, "do_sample": True, "return_full_text": True}
    response = await client.post("/vertex", json={"instances": [{"inputs": "x", "parameters": asked}]})
    assert await response.json() == {"predictions": ["xmore"]}


@pytest.mark.parametrize(
    ("instance", "field"),
    [
        ({"messages": MESSAGES, "n": 2}, "n"),
        ({"messages": MESSAGES, "stream": True}, "stream"),
        ({"inputs": "x", "stream": True}, "stream"),
    ],
)
async def test_vertex_refuses_what_is_no_single_text(
    start: Start, say: Say, instance: dict[str, object], field: str
) -> None:
    engine = say("a")
    client = await start(engine)
    response = await client.post("/vertex", json={"instances": [{"inputs": "x"}, instance]})
    assert response.status == 422
    assert (await response.json())["error"].startswith(f"instances[1].{field} is ")
    assert not engine.requests


async def test_vertex_says_what_an_instance_needs(start: Start, say: Say) -> None:
    client = await start(say("a"))
    response = await client.post("/vertex", json={"instances": [{"prompt": "x"}]})
    assert response.status == 422
    assert (await response.json())["error"] == (
        "instances[0].inputs is missing, and so is messages; give one of them"
    )


async def test_vertex_names_the_instance_at_fault(start: Start, say: Say) -> None:
    client = await start(say("a"))
    body = {"instances": [{"inputs": "x"}, {"inputs": "x", "parameters": {"max_new_tokens": 0}}]}
    response = await client.post("/vertex", json=body)
    assert response.status == 422
    assert (await response.json())["error"].startswith("instances[1].parameters.max_new_tokens")
