"""Qwen 2 and 2.5: Llama with biases on q, k and v, which the checkpoint brings. arXiv:2407.10671."""

from __future__ import annotations

from tgi_server.config import ModelConfig
from tgi_server.layers.attention import Attention
from tgi_server.layers.rope import cos_sin_table
from tgi_server.layers.weights import Weights
from tgi_server.models.decoder import Decoder
from tgi_server.models.window import qwen_windows


def load(weights: Weights, config: ModelConfig) -> Decoder:
    cos_sin = cos_sin_table(config, weights.device)
    windows = qwen_windows(config)
    return Decoder(weights, config, lambda at, layer: Attention(at, config, cos_sin, window=windows[layer]))
