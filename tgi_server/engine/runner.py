"""Model, KV cache and sampler on one device: computes plans, in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgi_kernels.sampling import greedy
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import PAGE_TOKENS, EngineConfig, ModelConfig
from tgi_server.engine.batch import BatchBuilder
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.models import load_model


@dataclass(frozen=True)
class Launched:
    """A step that is done."""

    ids: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] fp32

    def result(self) -> list[Sampled]:
        """What each sampling work item got, in the plan's order."""
        pairs = zip(self.ids.tolist(), self.logprobs.tolist(), strict=True)
        return [Sampled([token], [logprob]) for token, logprob in pairs]


class CpuRunner:
    """Computes in fp32; 16-bit weights stay 16-bit in memory and are widened in registers."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and reserve the cache. Raises StartupError for a checkpoint that cannot be used."""
        model_config = ModelConfig.from_folder(config.model)
        self._model = load_model(Checkpoint(config.model), model_config, torch.device("cpu"), torch.float32)
        self.num_pages = config.num_pages
        spec = self._model.cache_specs[0]
        shape = (len(self._model.cache_specs), config.num_pages, 2, spec.kv_heads, PAGE_TOKENS, spec.head_dim)
        self._kv = torch.zeros(shape)
        self._builder = BatchBuilder(config.max_sequences, -(-config.max_total_tokens // PAGE_TOKENS))
        self._last_ids = np.zeros(config.max_sequences, np.int64)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Compute `plan`, which must not be empty."""
        host = self._builder.build(plan)
        host.token_ids[host.fed_at] = self._last_ids[host.fed_rows]
        batch = host.on_cpu()
        hidden = self._model(batch, self._kv)
        ids, logprobs = greedy(self._model.logits(hidden[batch.logit_rows]))
        self._last_ids[host.sampling_rows] = ids.numpy()
        return Launched(ids, logprobs)
