"""The whole way, HTTP to HTTP, on a real model. The oracle is transformers in fp32 on the same folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.server import DEMO, Server

PROMPTS = (
    "The three laws of thermodynamics are",
    "def fibonacci(n):\n    ",
    "Il était une fois, dans un petit village,",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Die Hauptstadt von Österreich ist",
    "Q: What is the boiling point of water at sea level?\nA:",
    "SELECT name, COUNT(*) FROM orders WHERE date > '2024-01-01'",
    "日本の首都は",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def oracle() -> dict[str, list[int]]:
    """What transformers' greedy search generates for each prompt."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    answers = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers[prompt] = ids[0, inputs.input_ids.shape[1] :].tolist()
    return answers


def _body(prompt: str) -> dict[str, object]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": NEW_TOKENS, "details": True}}


def generate(server: Server, prompt: str) -> list[int]:
    return [token["id"] for token in server.post("/generate", _body(prompt))["details"]["tokens"]]


def stream(server: Server, prompt: str) -> list[int]:
    return [event["token"]["id"] for event in server.stream("/generate_stream", _body(prompt))]


@pytest.mark.parametrize("ask", [generate, stream])
def test_tokens_equal_the_oracle_alone(server: Server, oracle: dict[str, list[int]], ask) -> None:
    for prompt in PROMPTS:
        assert ask(server, prompt) == oracle[prompt], prompt


@pytest.mark.parametrize("ask", [generate, stream])
def test_tokens_equal_the_oracle_among_sixteen_others(
    server: Server, oracle: dict[str, list[int]], ask
) -> None:
    crowd = [f"Item {i} of {'many ' * i}things:" for i in range(16)]
    with ThreadPoolExecutor(24) as pool:
        others = [pool.submit(generate, server, prompt) for prompt in crowd]
        answers = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
        for other in others:
            other.result()
    assert dict(zip(PROMPTS, answers, strict=True)) == oracle


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
