"""Answers, chunks and errors are what the OpenAI SDK's types say, checked as strictly as those types can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject

from tests.http.conftest import ALL, Start
from tests.http.events import read_events
from tests.http.fake_engine import FakeEngine
from tgi_server.errors import ErrorKind, UserError

Say = Callable[..., FakeEngine]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hello"}], "prompt": ["x", "y"]}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"stop": " "},
        {"max_tokens": 2},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True},
    ],
    ids=str,
)
async def test_chats_and_their_streams(start: Start, say: Say, fields: dict[str, Any]) -> None:
    client = await start(say("hello wé"), honoured=ALL)
    whole = ChatCompletion.model_validate(
        await (await client.post(CHAT, json={**ASK, **fields})).json(), strict=True
    )
    response = await client.post(CHAT, json={**ASK, **fields, **USAGE, "stream": True})
    *events, done = await read_events(response)
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        listed = [entry for one in own if one.logprobs for entry in one.logprobs.content or []]
        assert listed == ((choice.logprobs.content or []) if choice.logprobs else [])


@pytest.mark.parametrize(
    "fields", [{}, {"n": 2}, {"stop": " "}, {"max_tokens": 2}, {"logprobs": 2}, {"logprobs": 0}], ids=str
)
async def test_completions_and_their_streams(start: Start, say: Say, fields: dict[str, Any]) -> None:
    client = await start(say("hello wé"), honoured=ALL)
    whole = Completion.model_validate(
        await (await client.post(COMPLETIONS, json={**ASK, **fields})).json(), strict=True
    )
    response = await client.post(COMPLETIONS, json={**ASK, **fields, **USAGE, "stream": True})
    *events, usage, done = await read_events(response)
    assert done == "[DONE]"
    assert Completion.model_validate(usage, strict=True).usage == whole.usage
    for choice in whole.choices:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice.index]
        assert "".join(one["text"] for one in own) == choice.text
        # The SDK's type has no null here, but that is what OpenAI sends until the last chunk.
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        last = {**events[-1], "choices": own[-1:]}
        assert Completion.model_validate(last, strict=True).system_fingerprint == whole.system_fingerprint


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ErrorKind.OVERLOADED, "rate_limit_exceeded"),
        (ErrorKind.UNAUTHORIZED, "invalid_api_key"),
        (ErrorKind.UNAVAILABLE, "unavailable"),
        (ErrorKind.GENERATION, "generation"),
    ],
)
@pytest.mark.parametrize("fail_at", [0, 2])
async def test_errors_before_and_in_a_stream(
    start: Start, say: Say, kind: ErrorKind, code: str, fail_at: int
) -> None:
    client = await start(say("hello world", fail_at=fail_at, failure=UserError(kind, "because")))
    response = await client.post(CHAT, json={**ASK, "stream": True})
    error = (await read_events(response))[-1] if fail_at else await response.json()
    assert ErrorObject.model_validate(error["error"], strict=True).code == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "other"}, "model_not_found"),
        ({"max_tokens": 1000}, "context_length_exceeded"),
        ({"prompt": [1] * 300}, "context_length_exceeded"),
        ({"top_p": 5}, "invalid"),
    ],
)
async def test_errors_have_openais_words_where_it_has_some(
    start: Start, say: Say, fields: dict[str, Any], code: str
) -> None:
    client = await start(say("a"))
    error = await (await client.post(COMPLETIONS, json={**ASK, **fields})).json()
    assert ErrorObject.model_validate(error["error"], strict=True).code == code


async def test_models(start: Start, say: Say) -> None:
    client = await start(say("a"))
    Model.model_validate(await (await client.get("/v1/models/tiny")).json(), strict=True)
