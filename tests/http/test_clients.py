"""The clients people have: what they send is understood, and what they get is what they expect."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from aiohttp.test_utils import TestClient
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import ValidationError

from tests.http.conftest import ALL, Start
from tests.http.fake_engine import FakeEngine
from tgi_server.errors import ErrorKind, UserError

Say = Callable[..., FakeEngine]
USER = {"role": "user", "content": "hello"}


def sdk(client: TestClient, key: str = "unused") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key=key, max_retries=0)


def hub(client: TestClient) -> AsyncInferenceClient:
    return AsyncInferenceClient(model=str(client.make_url("/")).rstrip("/"))


async def test_the_openai_sdk_gets_a_chat(start: Start, say: Say) -> None:
    client = sdk(await start(say("one END two"), honoured=ALL))
    answer = await client.chat.completions.create(
        model="tiny", messages=[USER], stop="END", logprobs=True, top_logprobs=2, n=2, temperature=0.5
    )
    assert [choice.message.content for choice in answer.choices] == ["one ", "one "]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    assert answer.choices[0].finish_reason == "stop"


async def test_the_openai_sdk_gets_a_stream_with_its_usage(start: Start, say: Say) -> None:
    client = sdk(await start(say("hello wé")))
    stream = await client.chat.completions.create(
        model="tiny", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello wé"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


async def test_the_openai_sdk_gets_completions(start: Start, say: Say) -> None:
    client = sdk(await start(say("hello"), honoured=ALL))
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["ahello", "bhello"]
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ErrorKind.INVALID, openai.BadRequestError),
        (ErrorKind.NOT_FOUND, openai.NotFoundError),
        (ErrorKind.OVERLOADED, openai.RateLimitError),
        (ErrorKind.GENERATION, openai.InternalServerError),
        (ErrorKind.UNAVAILABLE, openai.InternalServerError),
    ],
)
async def test_the_openai_sdk_raises_its_own_errors(
    start: Start, say: Say, kind: ErrorKind, expected: type[openai.APIStatusError]
) -> None:
    client = sdk(await start(say("a", fail_at=0, failure=UserError(kind, "because"))))
    for stream in (False, True):
        with pytest.raises(expected, match="because"):
            await client.chat.completions.create(model="tiny", messages=[USER], stream=stream)


async def test_the_openai_sdk_learns_of_an_error_in_the_middle_of_a_stream(start: Start, say: Say) -> None:
    failure = UserError(ErrorKind.UNAVAILABLE, "the engine has ended")
    client = sdk(await start(say("hello world", fail_at=2, failure=failure)))
    stream = await client.chat.completions.create(model="tiny", messages=[USER], stream=True)
    with pytest.raises(openai.APIError, match="the engine has ended"):
        _ = [chunk async for chunk in stream]


async def test_the_openai_sdk_sends_its_key(start: Start, say: Say) -> None:
    client = await start(say("a"), api_keys=("right",))
    assert [model.id async for model in sdk(client, "right").models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        await sdk(client, "wrong").models.list()


async def test_the_hubs_client_generates_with_details_and_in_a_stream(start: Start, say: Say) -> None:
    client = hub(await start(say("one END two"), honoured=ALL))
    assert await client.text_generation("x", stop=["END"]) == "xone END", "as TGI's `POST /` does"
    assert await client.text_generation("x", stop=["END"], return_full_text=False) == "one END"
    answer = await client.text_generation("x", details=True, max_new_tokens=3, best_of=2, do_sample=True)
    assert answer.details is not None
    assert answer.details.generated_tokens == 3
    assert answer.details.best_of_sequences is not None
    pieces = [piece async for piece in await client.text_generation("x", stream=True, max_new_tokens=3)]
    assert pieces == ["o", "n", "e"]
    events = [event async for event in await client.text_generation("x", stream=True, details=True)]
    assert events[-1].generated_text == "xone END two"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "eos_token"


async def test_the_hubs_client_chats(start: Start, say: Say) -> None:
    client = hub(await start(say("hello")))
    answer = await client.chat_completion([USER], max_tokens=5)
    assert answer.choices[0].message.content == "hello"
    chunks = [chunk async for chunk in await client.chat_completion([USER], stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"


async def test_the_hubs_client_reports_errors(start: Start, say: Say) -> None:
    client = hub(await start(say("a")))
    with pytest.raises(ValidationError, match="max_new_tokens"):
        await client.text_generation("x", max_new_tokens=100_000)
