"""Model, KV cache and sampler on one device: computes plans, in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import PAGE_TOKENS, EngineConfig, ModelConfig
from tgi_server.engine.batch import BatchBuilder
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.engine.sampler import Sampler, results
from tgi_server.engine.verify import folded, unrolled
from tgi_server.layers.cache import pool_shape
from tgi_server.layers.kinds import kinds
from tgi_server.layers.weights import Source
from tgi_server.models import load_model


@dataclass(frozen=True)
class Launched:
    """A step that is done."""

    sampled: list[Sampled]

    def result(self) -> list[Sampled]:
        """What each work item that samples or is scored got, in the plan's order."""
        return self.sampled


class CpuRunner:
    """Computes in fp32; 16-bit weights stay 16-bit in memory and are widened in registers."""

    def __init__(self, config: EngineConfig, source: Source | None = None) -> None:
        """Load the model, from its folder unless a source is given, and reserve the cache.

        Raises StartupError for a checkpoint that cannot be used.
        """
        model_config = ModelConfig.from_folder(config.model)
        self._model = load_model(
            source or open_checkpoint(config.model),
            model_config,
            torch.device("cpu"),
            torch.float32,
            config.quantize,
        )
        self.num_pages = config.num_pages
        self.matrices = kinds(self._model)
        self._kv = torch.zeros(pool_shape(self._model.cache_specs, config.num_pages))
        self._builder = BatchBuilder(config.max_sequences, -(-config.max_total_tokens // PAGE_TOKENS))
        self._last_ids = np.zeros(config.max_sequences, np.int64)
        self._sampler = Sampler(
            config.max_sequences, config.max_total_tokens, model_config.vocab_size, torch.device("cpu")
        )

    def device_bytes(self) -> int:
        return 0

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Compute `plan`, which must not be empty."""
        steps = unrolled(plan)
        self._sampler.read(steps)
        host = self._builder.build(steps)
        host.token_ids[host.fed_at] = self._last_ids[host.fed_rows]
        batch = host.on_cpu()
        hidden = self._model(batch, self._kv)
        scored = self._sampler.score(steps, hidden, self._model.logits)
        drawn = self._sampler.draw(steps, self._model.logits(hidden[batch.logit_rows]))
        sampled = folded(plan, results(steps, drawn, scored))
        for work, result in zip(
            (work for work in plan.work if work.samples or work.scored), sampled, strict=True
        ):
            if work.samples:
                self._last_ids[work.row] = result.token_ids[-1]
        return Launched(sampled)
