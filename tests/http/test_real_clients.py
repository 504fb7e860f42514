"""Clients people have, with a real server and a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from huggingface_hub import InferenceClient

from tests.server import ROOT, Server

VENV = ROOT / "build" / "text-generation-client"
SCRIPT = Path(__file__).resolve().parent / "client_of_tgi.py"
ASK = [{"role": "user", "content": "What is the capital of France? Explain in one sentence."}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="session")
def tgi_python() -> Path:
    """An interpreter that has TGI's client; made once, kept in build/."""
    python = VENV / "bin" / "python"
    ready = VENV / ".ready"
    if ready.exists():
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, capture_output=True)
        install = ["-m", "pip", "install", "--quiet", "text-generation==0.7.0", "huggingface-hub<0.30"]
        subprocess.run([str(python), *install], check=True, capture_output=True, timeout=180)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"text-generation cannot be installed here: {error}")
    ready.touch()
    return python


def test_the_client_of_tgi_generates_streams_and_reports_errors(server: Server, tgi_python: Path) -> None:
    run = subprocess.run(
        [str(tgi_python), str(SCRIPT), server.url], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["tokens"] == seen["last_details"] == 4
    assert seen["finish"] == "length"
    assert seen["prefill"] == 5
    assert seen["top"] == [2, 2, 2, 2]
    assert seen["stopped"].endswith("5"), "TGI keeps the stop string"
    assert seen["stop_reason"] == "stop_sequence"
    assert seen["best_of"] == 1
    assert seen["streamed"] == seen["last"] == seen["text"]
    assert seen["seeded"][0] == seen["seeded"][1]
    assert seen["chat"]
    assert "max_new_tokens" in seen["error"]


def test_the_openai_sdk_chats_streams_and_reports_errors(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    (model,) = client.models.list().data
    answer = client.chat.completions.create(
        model=model.id, messages=ASK, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].token == token.token, "greedy: the likeliest was taken"
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)
    stream = client.chat.completions.create(
        model=model.id, messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage == answer.usage
    stopped = client.chat.completions.create(model=model.id, messages=ASK, temperature=0, stop="Paris")
    assert stopped.choices[0].message.content == ANSWER.split("Paris", maxsplit=1)[0]
    several = client.completions.create(model=model.id, prompt="Once", n=3, max_tokens=6, seed=5)
    again = client.completions.create(model=model.id, prompt="Once", n=3, max_tokens=6, seed=5)
    assert [one.text for one in several.choices] == [one.text for one in again.choices]
    assert len({one.text for one in several.choices}) > 1
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model=model.id, messages=ASK, max_tokens=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=ASK)


def test_the_hubs_client_generates_and_chats(server: Server) -> None:
    client = InferenceClient(model=server.url)
    prompt = "The capital of France is"
    whole = client.text_generation(prompt, max_new_tokens=4, details=True, return_full_text=False)
    assert whole.details is not None and whole.details.generated_tokens == 4
    pieces = client.text_generation(prompt, max_new_tokens=4, stream=True)
    assert "".join(pieces) == whole.generated_text
    answer = client.chat_completion(ASK, temperature=0.0, max_tokens=20)
    assert answer.choices[0].message.content == ANSWER
    stopped = client.text_generation("1, 2, 3,", max_new_tokens=20, stop=["5"], return_full_text=False)
    assert stopped.endswith("5")
