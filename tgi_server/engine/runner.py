"""Model, KV cache and sampler on one device: computes plans, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import PAGE_TOKENS, EngineConfig, ModelConfig
from tgi_server.engine.batch import BatchBuilder
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.engine.sampler import Drawn, Sampler, Scored, results
from tgi_server.layers.weights import Source
from tgi_server.models import load_model


@dataclass(frozen=True)
class Launched:
    """A step that is done."""

    plan: Plan
    drawn: Drawn
    scored: Mapping[int, Scored]

    def result(self) -> list[Sampled]:
        """What each work item that samples or is scored got, in the plan's order."""
        return results(self.plan, self.drawn, self.scored)


class CpuRunner:
    """Computes in fp32; 16-bit weights stay 16-bit in memory and are widened in registers."""

    def __init__(self, config: EngineConfig, source: Source | None = None) -> None:
        """Load the model, from its folder unless a source is given, and reserve the cache.

        Raises StartupError for a checkpoint that cannot be used.
        """
        model_config = ModelConfig.from_folder(config.model)
        self._model = load_model(
            source or Checkpoint(config.model), model_config, torch.device("cpu"), torch.float32
        )
        self.num_pages = config.num_pages
        spec = self._model.cache_specs[0]
        shape = (len(self._model.cache_specs), config.num_pages, 2, spec.kv_heads, PAGE_TOKENS, spec.head_dim)
        self._kv = torch.zeros(shape)
        self._builder = BatchBuilder(config.max_sequences, -(-config.max_total_tokens // PAGE_TOKENS))
        self._last_ids = np.zeros(config.max_sequences, np.int64)
        self._sampler = Sampler(
            config.max_sequences, config.max_total_tokens, model_config.vocab_size, torch.device("cpu")
        )

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Compute `plan`, which must not be empty."""
        self._sampler.read(plan)
        host = self._builder.build(plan)
        host.token_ids[host.fed_at] = self._last_ids[host.fed_rows]
        batch = host.on_cpu()
        hidden = self._model(batch, self._kv)
        scored = self._sampler.score(plan, hidden, self._model.logits)
        drawn = self._sampler.draw(plan, self._model.logits(hidden[batch.logit_rows]))
        self._last_ids[host.sampling_rows] = drawn.ids.numpy()
        return Launched(plan, drawn, scored)
