"""The engine without its process and its socket: real scheduler, runner and step loop, requests from a list."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from tgi_server.checkpoint.dummy import DummyCheckpoint
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import EngineConfig, ModelConfig
from tgi_server.engine import collector
from tgi_server.engine.engine import Engine, Launched, Runner
from tgi_server.engine.gpu_runner import DTYPES, GpuRunner
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.engine.request import FromEngine, GenerationRequest, StepEvents, ToEngine, TokenEvent
from tgi_server.engine.runner import CpuRunner
from tgi_server.models import load_model

LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}


@dataclass
class Wire:
    """Requests to hand over at the next step, and what came back; sorted when it is asked for, not while it comes."""

    requests: list[ToEngine] = field(default_factory=list)
    finished: int = 0
    _said: list[tuple[float, list[TokenEvent]]] = field(default_factory=list)  # not sorted yet
    _token_times: dict[str, list[float]] = field(default_factory=dict)
    _tokens: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _errors: list[str] = field(default_factory=list)
    _encoder: msgspec.msgpack.Encoder = field(default_factory=msgspec.msgpack.Encoder)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        del timeout_s
        arrived, self.requests = self.requests, []
        return arrived

    def send(self, message: FromEngine) -> None:
        """Encodes it, too, which the engine's host does for every step."""
        self._encoder.encode(message)
        if isinstance(message, StepEvents):
            self._said.append((time.perf_counter(), message.events))
            self.finished += sum(event.finish is not None for event in message.events)

    @property
    def token_times(self) -> dict[str, list[float]]:
        """By request: when each of its tokens came."""
        self._sort()
        return self._token_times

    @property
    def tokens(self) -> dict[str, list[tuple[int, float]]]:
        """By request: ids and logprobs."""
        self._sort()
        return self._tokens

    @property
    def errors(self) -> list[str]:
        self._sort()
        return self._errors

    def _sort(self) -> None:
        said, self._said = self._said, []
        for at, events in said:
            for event in events:
                self._errors += [event.error] if event.error else []
                self._token_times.setdefault(event.id, []).extend([at] * len(event.token_ids))
                self._tokens.setdefault(event.id, []).extend(
                    zip(event.token_ids, event.logprobs, strict=True)
                )


class Waiting:
    """A step under way; adds the time that is waited for it to its runner's."""

    def __init__(self, launched: Launched, watched: Watched) -> None:
        self._launched = launched
        self._watched = watched

    def result(self) -> list[Sampled]:
        began = time.perf_counter()
        sampled = self._launched.result()
        self._watched.waited_s += time.perf_counter() - began
        return sampled


class Watched:
    """A runner that knows how long the host has waited for its device."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.num_pages = runner.num_pages
        self.matrices = runner.matrices
        self.waited_s = 0.0
        self.steps = 0

    def device_bytes(self) -> int:
        return self._runner.device_bytes()

    def launch(self, plan: Plan) -> Waiting:
        self.steps += 1
        return Waiting(self._runner.launch(plan), self)


@dataclass
class InProcess:
    engine: Engine
    wire: Wire
    vocab_size: int
    runner: GpuRunner | CpuRunner
    watched: Watched
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _count: int = 0

    def ask(self, prompt_tokens: int, new_tokens: int) -> str:
        """Queue a request with a random prompt (so that no prefix is found); its id."""
        return self.submit(self._random.choices(range(self.vocab_size), k=prompt_tokens), new_tokens)

    def submit(self, prompt: list[int], new_tokens: int, **fields: Any) -> str:
        """Queue a request, with more fields of `GenerationRequest` if given; its id."""
        self._count += 1
        name = str(self._count)
        self.wire.requests.append(
            GenerationRequest(id=name, prompt_ids=prompt, max_new_tokens=new_tokens, **fields)
        )
        return name

    def finish(self) -> None:
        """Step until everything asked for is answered."""
        while self.wire.finished < self._count:
            self.engine.step()
        assert not self.wire.errors, self.wire.errors[0]

    def warm_up(self, batch_tokens: int) -> None:
        """Run every kernel once, the largest step included."""
        for tokens in (1, 17, 512, batch_tokens):
            self.ask(tokens, 3)
            self.finish()


def llama_8b_on_gpu(
    max_sequences: int,
    max_total_tokens: int,
    max_batch_tokens: int,
    *,
    fp8_cache: bool = False,
    quantization: Mapping[str, object] | None = None,
    deterministic: bool = False,
) -> InProcess:
    """Random weights of Llama 3.1 8B's shape, in the format that `quantization`, of a config.json, tells."""
    folder = Path(tempfile.mkdtemp())
    config = LLAMA_3_1_8B | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return on_gpu(
        EngineConfig(
            model=folder,
            max_total_tokens=max_total_tokens,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_queue=4096,
            num_pages=0,
            num_threads=1,
            target_s=10.0,  # measure steps as they come, not as a latency target would cut them
            device="cuda",
            dummy_weights=True,
            fp8_cache=fp8_cache,
            deterministic=deterministic,
        )
    )


def on_gpu(config: EngineConfig, depth: int = 1, wire: Wire | None = None) -> InProcess:
    """The engine of `config` in this process."""
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    torch.cuda.set_per_process_memory_fraction(config.memory_fraction)
    weights = (
        DummyCheckpoint(config.model, device, dtype)
        if config.dummy_weights
        else open_checkpoint(config.model)
    )
    model = load_model(
        weights,
        ModelConfig.from_folder(config.model),
        device,
        dtype,
        config.quantize,
        deterministic=config.deterministic,
    )
    wire, runner = wire or Wire(), GpuRunner(config, model, dtype)
    watched = Watched(runner)
    collector.settle()  # as the engine process does
    return InProcess(Engine(config, watched, wire, depth), wire, model.vocab_size, runner, watched)


def on_cpu(config: EngineConfig, wire: Wire | None = None) -> InProcess:
    """The same on the CPU, in fp32."""
    wire, runner = wire or Wire(), CpuRunner(config)
    watched = Watched(runner)
    vocab_size = ModelConfig.from_folder(config.model).vocab_size
    return InProcess(Engine(config, watched, wire), wire, vocab_size, runner, watched)
