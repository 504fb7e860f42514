"""Settings of the operator that change how requests are read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.http.conftest import ALL, Start
from tests.http.fake_engine import FakeEngine

Say = Callable[..., FakeEngine]
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 5}}),
    ],
)
async def test_what_a_request_leaves_out_comes_from_the_models_generation_config(
    start: Start, say: Say, path: str, body: dict[str, object]
) -> None:
    engine = say("a")
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 40.0, "repetition_penalty": 1.1}
    client = await start(engine, honoured=ALL, sampling_defaults=defaults)
    assert (await client.post(path, json=body)).status == 200
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 40)
    assert sampling.repetition_penalty == 1.1
    own = {"temperature": 0.2, "top_p": 1.0, "top_k": 7}
    asked = {**body, "parameters": own} if path == "/generate" else {**body, **own}
    await client.post(path, json=asked)
    sampling = engine.requests[1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 1.0, 7)


async def test_without_that_setting_nothing_but_what_was_asked_for_counts(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine, honoured=ALL)
    await client.post("/v1/chat/completions", json={"messages": MESSAGES})
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


async def test_prompts_may_have_a_limit_of_their_own(start: Start, say: Say) -> None:
    client = await start(say("a"), max_input_tokens=10)
    assert (await client.post("/generate", json={"inputs": "x" * 9})).status == 200
    response = await client.post("/generate", json={"inputs": "x" * 10})
    assert response.status == 422
    assert "has 11 tokens" in (await response.json())["error"]
    assert (await (await client.get("/info")).json())["max_input_tokens"] == 10


@pytest.mark.parametrize(
    ("setting", "value", "body"),
    [
        ("max_best_of", 3, {"best_of": 3, "do_sample": True}),
        ("max_stop_sequences", 6, {"stop": list("abcdef")}),
        ("max_top_n_tokens", 9, {"top_n_tokens": 9}),
    ],
)
async def test_limits_of_tgis_fields_are_the_operators(
    start: Start, say: Say, setting: str, value: int, body: dict[str, object]
) -> None:
    for limit, status in ((value, 200), (value - 1, 422)):
        client = await start(say("a"), honoured=ALL, **{setting: limit})
        assert (await client.post("/generate", json={"inputs": "x", "parameters": body})).status == status


async def test_prompts_of_one_request_are_limited(start: Start, say: Say) -> None:
    client = await start(say("a"), max_client_batch_size=2)
    assert (await client.post("/v1/completions", json={"prompt": ["a", "b"]})).status == 200
    assert (await client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})).status == 400
