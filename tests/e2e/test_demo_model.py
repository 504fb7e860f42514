"""The whole way, HTTP to HTTP, on a real model: the same tokens as in process, where transformers checks them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import NEW_TOKENS, Reference
from tests.e2e.prompts import PROMPTS
from tests.engine.agreement import say
from tests.engine.gpu_rig import engine
from tests.server import DEMO, Server, computes_on_gpu

SOME = PROMPTS[:8]
STOPS = (2,)  # <|im_end|>, the model's only end-of-sequence id


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[str, list[int]]:
    """The ids of each answer on the device that servers compute on, up to the first end-of-sequence id."""
    if computes_on_gpu():
        sizes = {"max_total_tokens": 4096, "max_batch_tokens": 4096, "num_pages": 1024}
        all_ids = [said.ids for said in say(engine(DEMO, **sizes), reference.prompts, NEW_TOKENS)]
    else:
        all_ids = [answer.ids for answer in reference.answers]
    answers = {}
    for prompt, ids in zip(PROMPTS, all_ids, strict=True):
        end = next((i + 1 for i, token in enumerate(ids) if token in STOPS), NEW_TOKENS)
        answers[prompt] = ids[:end]
    return answers


def test_the_answers_are_the_greedy_search_of_transformers_token_for_token(reference: Reference) -> None:
    """No allowance for ties: what HTTP is compared with below is what transformers finds likeliest at each place."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for prompt, answer in zip(reference.prompts[: len(SOME)], reference.answers, strict=False):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.ids[:-1]])).logits[0, len(prompt) - 1 :]
        assert answer.ids == logits.argmax(-1).tolist()


def _body(prompt: str) -> dict[str, object]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": NEW_TOKENS, "details": True}}


def generate(server: Server, prompt: str) -> list[int]:
    return [token["id"] for token in server.post("/generate", _body(prompt))["details"]["tokens"]]


def stream(server: Server, prompt: str) -> list[int]:
    return [event["token"]["id"] for event in server.stream("/generate_stream", _body(prompt))]


@pytest.mark.parametrize("ask", [generate, stream])
def test_tokens_equal_those_in_process_alone(server: Server, expected: dict[str, list[int]], ask) -> None:
    for prompt in SOME:
        assert ask(server, prompt) == expected[prompt], prompt


@pytest.mark.parametrize("ask", [generate, stream])
def test_tokens_equal_those_in_process_among_sixteen_others(
    server: Server, expected: dict[str, list[int]], ask
) -> None:
    crowd = [f"Item {i} of {'many ' * i}things:" for i in range(16)]
    with ThreadPoolExecutor(24) as pool:
        others = [pool.submit(generate, server, prompt) for prompt in crowd]
        answers = list(pool.map(lambda prompt: ask(server, prompt), SOME))
        for other in others:
            other.result()
    assert answers == [expected[prompt] for prompt in SOME]


def test_the_capital_of_france(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France? Explain in one sentence."}],
        "temperature": 0,
    }
    (choice,) = server.post("/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"] == "The capital of France is Paris."
    assert choice["finish_reason"] == "stop"
    chunks = list(server.stream("/v1/chat/completions", body | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(deltas) == choice["message"]["content"]
