"""Qwen 3, dense: Llama with a norm on every q and k head. arXiv:2505.09388."""

from __future__ import annotations

from tgi_server.config import ModelConfig
from tgi_server.layers.attention import Attention, HeadNorms
from tgi_server.layers.rope import cos_sin_table
from tgi_server.layers.weights import Weights
from tgi_server.models.decoder import Decoder
from tgi_server.models.window import qwen_windows


def load(weights: Weights, config: ModelConfig) -> Decoder:
    cos_sin = cos_sin_table(config, weights.device)
    windows = qwen_windows(config)

    def attention(at: Weights, layer: int) -> Attention:
        return Attention(at, config, cos_sin, window=windows[layer], head_norms=HeadNorms(at, config))

    return Decoder(weights, config, attention)
