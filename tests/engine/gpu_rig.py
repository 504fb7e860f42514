"""A small llama on the GPU, and engines that serve it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.in_process import InProcess, Wire, on_cpu, on_gpu
from tgi_server.config import EngineConfig
from tgi_server.engine.request import FromEngine, StepEvents, TokenEvent

VOCAB = 3000
Answer = list[tuple[int, float]]  # ids and logprobs


def save_llama(path: Path) -> None:
    """A small llama whose logits are spread, so that rounding seldom changes the likeliest token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


CONFIG = EngineConfig(
    model=Path(),
    max_total_tokens=1024,
    max_batch_tokens=512,
    max_sequences=24,
    max_queue=500,
    num_pages=600,
    num_threads=1,
    target_s=10.0,
    device="cuda",
)


@dataclass
class Recorder(Wire):
    events: dict[str, list[TokenEvent]] = field(default_factory=dict)

    def send(self, message: FromEngine) -> None:
        super().send(message)
        for event in message.events if isinstance(message, StepEvents) else ():
            self.events.setdefault(event.id, []).append(event)


def engine(folder: Path, depth: int = 1, **changes: Any) -> InProcess:
    return on_gpu(replace(CONFIG, model=folder, **changes), depth, Recorder())


def engine_on_cpu(folder: Path, **changes: Any) -> InProcess:
    return on_cpu(replace(CONFIG, model=folder, device="cpu", **changes), Recorder())


def events(rig: InProcess, name: str) -> list[TokenEvent]:
    """What was said of a request so far."""
    assert isinstance(rig.wire, Recorder)
    return rig.wire.events.get(name, [])


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [rng.choices(range(VOCAB), k=rng.choice((1, 15, 16, 17, 90, 300))) for _ in range(count)]


def answers(
    rig: InProcess, asked: list[list[int]], new_tokens: int = 40, fields: list[dict[str, Any]] | None = None
) -> list[Answer]:
    """What each prompt gets, with its own fields of GenerationRequest if given."""
    fields = fields or [{}] * len(asked)
    names = [rig.submit(prompt, new_tokens, **more) for prompt, more in zip(asked, fields, strict=True)]
    rig.finish()
    return [rig.wire.tokens[name] for name in names]
