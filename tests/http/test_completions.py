from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.http.conftest import ALL, Start
from tests.http.events import read_events
from tests.http.fake_engine import FakeEngine
from tests.text.tiny import BOS

Say = Callable[..., FakeEngine]
URL = "/v1/completions"


async def test_a_completion_answers_in_openais_shape(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    response = await client.post(URL, json={"model": "tiny", "prompt": "x"})
    assert response.status == 200, await response.text()
    answer = await response.json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").endswith("-native")
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", [[BOS, 263]]),
        (["hello", "x"], [[BOS, 263], [BOS, 87]]),
        ([263, 87], [[263, 87]]),
        ([[263], [87, 87]], [[263], [87, 87]]),
        ([[263], "x"], [[263], [BOS, 87]]),
    ],
)
async def test_a_prompt_is_text_or_ids_or_several_of_those(
    start: Start, say: Say, prompt: object, expected: list[list[int]]
) -> None:
    engine = say("a")
    client = await start(engine)
    answer = await (await client.post(URL, json={"prompt": prompt})).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert sorted(request.prompt_ids for request in engine.requests) == sorted(expected)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt[0]"),
        ({"prompt": [None]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [300]}, "prompt[0]"),
        ({"prompt": [[1, 2**31]]}, "prompt[0][1]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": [1] * 200}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": -1}, "logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": ["x"] * 3, "n": 3}, "n"),
        ({"prompt": ["x"] * 9}, "prompt"),
        ({"prompt": "x", "best_of": 1_000_000}, "best_of"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "x", "best_of": 2, "temperature": 0}, "best_of"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_wrong_is_named(start: Start, say: Say, body: object, field: str) -> None:
    engine = say("a")
    client = await start(engine, honoured=ALL)
    response = await client.post(URL, json=body)
    assert response.status == 400
    assert (await response.json())["error"]["param"] == field
    assert not engine.requests


async def test_echo_puts_the_prompt_before_the_answer(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    answer = await (await client.post(URL, json={"prompt": ["one ", [263]], "echo": True})).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one hello", "hellohello"]


async def test_echo_without_tokens_scores_the_prompt(start: Start, say: Say) -> None:
    engine = say("hello")
    client = await start(engine, honoured=ALL)
    body = {"prompt": "hello w", "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = await (await client.post(URL, json=body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "hello w"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["<|bos|>", "hello", " w"],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": None,
        "text_offset": [0, 7, 12],
    }
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert engine.requests[0].prompt_logprobs


async def test_logprobs_are_parallel_arrays_and_half_characters_are_spelled_as_bytes(
    start: Start, say: Say
) -> None:
    client = await start(say("hé"), honoured=ALL)
    answer = await (await client.post(URL, json={"prompt": "x", "logprobs": 1})).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "<|end|>"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"] == [{"!": -0.5, token: -0.5} for token in logprobs["tokens"]]
    assert len(logprobs["text_offset"]) == 4


async def test_echo_in_a_stream_comes_first_and_its_logprobs_with_it(start: Start, say: Say) -> None:
    client = await start(say("hello"), honoured=ALL)
    body = {"prompt": ["hello w", "x"], "echo": True, "logprobs": 0, "max_tokens": 1}
    whole = (await (await client.post(URL, json=body)).json())["choices"]
    *chunks, done = await read_events(await client.post(URL, json={**body, "stream": True}))
    assert done == "[DONE]"
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["text"] == body["prompt"][index]
        assert "".join(choice["text"] for choice in own) == whole[index]["text"]
        for name in ("tokens", "token_logprobs"):
            joined = [entry for choice in own for entry in choice["logprobs"][name]]
            assert joined == whole[index]["logprobs"][name]


async def test_echo_without_tokens_streams_the_prompt_alone(start: Start, say: Say) -> None:
    client = await start(say("hello"), honoured=ALL)
    body = {"prompt": "hello w", "echo": True, "max_tokens": 0, "stream": True}
    chunk, usage, _ = await read_events(
        await client.post(URL, json={**body, "stream_options": {"include_usage": True}})
    )
    assert chunk["choices"][0]["text"] == "hello w"
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


async def test_every_chunk_tells_the_usage_so_far_if_asked_to(start: Start, say: Say) -> None:
    client = await start(say("abc"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post(URL, json={"prompt": "x", "stream": True, "stream_options": options})
    *chunks, _ = await read_events(response)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}


async def test_best_of_gives_the_likeliest_n(start: Start, choose: Say) -> None:
    engine = choose(("second", -0.8), ("third, and long", -0.9), ("first", -0.7))
    client = await start(engine, honoured=ALL)
    answer = await (await client.post(URL, json={"prompt": ["x", "y"], "n": 2, "best_of": 3})).json()
    assert len(engine.requests) == 6
    given = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert given == [(0, "first"), (1, "second"), (2, "first"), (3, "second")]
    made = sum(len(script) + 1 for script, _ in engine.choices)
    assert answer["usage"]["completion_tokens"] == 2 * made, "those not given were generated, too"


async def test_streams_of_several_prompts_interleave_by_index(start: Start, say: Say) -> None:
    client = await start(say("hello wé"))
    body: dict[str, Any] = {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = await read_events(await client.post(URL, json=body))
    assert done == "[DONE]"
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14}
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "hello wé"
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_come_back_if_asked_for(start: Start, say: Say, stream: bool) -> None:
    client = await start(say("hé"))
    response = await client.post(URL, json={"prompt": "x", "return_token_ids": True, "stream": stream})
    if stream:
        *chunks, _ = await read_events(response)
        ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
        assert chunks[0]["choices"][0]["prompt_token_ids"] == [BOS, 87]
        assert "prompt_token_ids" not in chunks[1]["choices"][0]
    else:
        choice = (await response.json())["choices"][0]
        ids = choice["token_ids"]
        assert choice["prompt_token_ids"] == [BOS, 87]
    assert len(ids) == 4
