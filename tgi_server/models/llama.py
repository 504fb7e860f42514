"""Llama and what is built like it: SmolLM2, TinyLlama, Yi, Vicuna. arXiv:2302.13971, arXiv:2407.21783."""

from __future__ import annotations

from tgi_server.config import ModelConfig
from tgi_server.layers.attention import Attention
from tgi_server.layers.rope import cos_sin_table
from tgi_server.layers.weights import Weights
from tgi_server.models.decoder import Decoder


def load(weights: Weights, config: ModelConfig) -> Decoder:
    cos_sin = cos_sin_table(config, weights.device)
    return Decoder(weights, config, lambda at, _layer: Attention(at, config, cos_sin))
