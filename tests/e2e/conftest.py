"""The demo model in this process, its answers, and transformers' opinion of them: each computed once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.inprocess import Answer, Rig
from tests.e2e.prompts import PROMPTS
from tests.server import DEMO
from tgi_server.config import EngineConfig
from tgi_server.engine.runner import CpuRunner

NEW_TOKENS = 64


@dataclass(frozen=True)
class Reference:
    """Every prompt answered alone, its tokens computed in one step."""

    prompts: list[list[int]]
    answers: list[Answer]


@pytest.fixture(scope="session")
def runner() -> CpuRunner:
    assert (DEMO / "config.json").exists(), f"{DEMO} is missing; `make test` fetches it"
    return CpuRunner(
        EngineConfig(
            model=DEMO,
            max_total_tokens=4096,
            max_batch_tokens=4096,
            max_sequences=32,
            max_queue=1000,
            num_pages=1024,
            num_threads=2,
        )
    )


@pytest.fixture(scope="session")
def reference(runner: CpuRunner) -> Reference:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(PROMPTS)]
    assert max(map(len, prompts)) >= 2000
    answers = [Rig(runner).generate([prompt], NEW_TOKENS)[0] for prompt in prompts]
    return Reference(prompts, answers)


@pytest.fixture(scope="session")
def oracle_logprobs(reference: Reference) -> list[Tensor]:
    """For each prompt [NEW_TOKENS, vocab]: transformers' fp32 logprobs of what follows, answer teacher-forced.

    Equal to its greedy search for as long as the answer's tokens are the likeliest, and cheaper: one forward
    pass for each prompt.
    """
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    found = []
    for prompt, answer in zip(reference.prompts, reference.answers, strict=True):
        ids = torch.tensor([prompt + answer.ids[:-1]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=NEW_TOKENS).logits[0]
        found.append(logits.log_softmax(-1))
    return found
