from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.http.conftest import ALL, Start
from tests.http.events import read_events
from tests.http.fake_engine import FakeEngine
from tests.text.tiny import BOS, END
from tgi_server.text.text import Text

Say = Callable[..., FakeEngine]


async def test_generate_answers_with_the_text_and_how_long_it_took(start: Start, say: Say) -> None:
    client = await start(say("hello wörld"))
    response = await client.post("/generate", json={"inputs": "héy"})
    assert response.status == 200
    assert await response.json() == {"generated_text": "hello wörld"}
    headers = response.headers
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == "3"
    assert headers["x-prompt-tokens"] == "5"
    assert headers["x-generated-tokens"] == "8"
    assert headers["x-queue-time"] == "2"
    for name in (
        "x-compute-time",
        "x-total-time",
        "x-validation-time",
        "x-inference-time",
        "x-time-per-token",
    ):
        assert float(headers[name]) >= 0


async def test_details_name_every_token_also_the_special_ones(start: Start, say: Say) -> None:
    client = await start(say("hellohé"))
    response = await client.post("/generate", json={"inputs": "x", "parameters": {"details": True}})
    details = (await response.json())["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == 5
    assert details["seed"] is None
    assert details["prefill"] == []
    assert "top_tokens" not in details
    assert [token["text"] for token in details["tokens"]] == ["hello", "h", "", "é", "<|end|>"]
    assert [token["special"] for token in details["tokens"]] == [False] * 4 + [True]
    assert details["tokens"][0] == {"id": 263, "text": "hello", "logprob": -0.5, "special": False}


async def test_the_prompt_is_encoded_with_the_special_tokens_of_the_file(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine)
    await client.post("/generate", json={"inputs": "hello"})
    request = engine.requests[0]
    assert request.prompt_ids == [BOS, 263]
    assert request.stop_token_ids == [END]
    assert request.max_new_tokens == 198, "all that is left of 200"


async def test_the_answer_ends_after_the_tokens_asked_for(start: Start, say: Say) -> None:
    client = await start(say("hello world"))
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2, "details": True}}
    answer = await (await client.post("/generate", json=body)).json()
    assert answer["generated_text"] == "hello w"
    assert answer["details"]["finish_reason"] == "length"


async def test_the_stop_text_stays_and_later_tokens_are_not_counted(start: Start, say: Say) -> None:
    engine = say("one END two", burst=4)
    client = await start(engine)
    body = {"inputs": "x", "parameters": {"stop": ["ND"], "details": True}}
    answer = await (await client.post("/generate", json=body)).json()
    assert answer["generated_text"] == "one END"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == len("one END")
    assert engine.cancelled == 1


async def test_the_full_text_starts_with_the_prompt(start: Start, say: Say) -> None:
    client = await start(say("hello"))
    body = {"inputs": "say: ", "parameters": {"return_full_text": True}}
    assert (await (await client.post("/generate", json=body)).json())["generated_text"] == "say: hello"


async def test_truncate_keeps_the_end_of_the_prompt(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine)
    await client.post("/generate", json={"inputs": "x" * 500 + "hello", "parameters": {"truncate": 2}})
    assert len(engine.requests[0].prompt_ids) == 2
    assert engine.requests[0].prompt_ids[1] == 263


async def test_a_stream_has_one_event_a_token_and_the_whole_text_in_the_last(start: Start, say: Say) -> None:
    client = await start(say("hellohé"))
    body = {"inputs": "x", "parameters": {"details": True}}
    response = await client.post("/generate_stream", json=body)
    assert response.status == 200
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["x-compute-type"] == "cpu"
    events = await read_events(response)
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5]
    assert [event["token"]["text"] for event in events] == ["hello", "h", "", "é", "<|end|>"]
    assert [event["generated_text"] for event in events] == [None] * 4 + ["hellohé"]
    assert [event["details"] for event in events[:-1]] == [None] * 4
    expected = {"finish_reason": "eos_token", "generated_tokens": 5, "seed": None, "input_length": 2}
    assert events[-1]["details"] == expected


async def test_a_stream_and_a_whole_answer_have_the_same_text(start: Start, say: Say) -> None:
    client = await start(say("one é END two", burst=3))
    body = {"inputs": "x", "parameters": {"stop": ["END"]}}
    whole = await (await client.post("/generate", json=body)).json()
    events = await read_events(await client.post("/generate_stream", json=body))
    assert events[-1]["generated_text"] == whole["generated_text"] == "one é END"


async def test_best_of_returns_the_likeliest_and_the_others_beside_it(start: Start, choose: Say) -> None:
    engine = choose(("a much longer one", -0.9), ("hello", -0.8))
    client = await start(engine, honoured=ALL)
    body = {
        "inputs": "x",
        "parameters": {"best_of": 2, "do_sample": True, "details": True, "top_n_tokens": 2},
    }
    answer = await (await client.post("/generate", json=body)).json()
    assert answer["generated_text"] == "hello"
    details = answer["details"]
    assert [request.sampling.choice for request in engine.requests] == [0, 1]
    assert engine.requests[0].sampling.seed == engine.requests[1].sampling.seed == details["seed"]
    (other,) = details["best_of_sequences"]
    assert other["generated_text"] == "a much longer one"
    assert len(details["top_tokens"][0]) == 2


async def test_prompt_logprobs_start_with_a_token_that_has_none(start: Start, say: Say) -> None:
    client = await start(say("a"), honoured=ALL)
    body = {"inputs": "hello", "parameters": {"decoder_input_details": True}}
    prefill = (await (await client.post("/generate", json=body)).json())["details"]["prefill"]
    assert prefill == [
        {"id": BOS, "text": "<|bos|>", "logprob": None},
        {"id": 263, "text": "hello", "logprob": -1.0},
    ]


async def test_without_parameters_tgi_samples_and_with_empty_ones_it_does_not(start: Start, say: Say) -> None:
    engine = say("a")
    client = await start(engine, honoured=ALL)
    await client.post("/generate", json={"inputs": "x"})
    await client.post("/generate", json={"inputs": "x", "parameters": {}})
    assert [request.sampling.temperature for request in engine.requests] == [1.0, 0.0]


async def test_a_tokenizer_may_know_ids_the_model_does_not(start: Start, say: Say, text: Text) -> None:
    small = Text(text.tokenizer, text.template, text.eos_token_ids, vocab_size=257)
    client = await start(say("a"), text=small)
    response = await client.post("/generate", json={"inputs": "hello"})
    assert response.status == 422
    assert "256" in (await response.json())["error"]


async def test_a_prompt_that_brings_its_own_bos_is_warned_of(
    start: Start, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start(say("a"))
    await client.post("/generate", json={"inputs": "hello"})
    assert "twice" not in caplog.text
    await client.post("/generate", json={"inputs": "<|bos|>hello"})
    assert "begins with <|bos|> twice" in caplog.text
