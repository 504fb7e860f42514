"""Mistral: Llama with a sliding window in every layer. arXiv:2310.06825."""

from __future__ import annotations

from tgi_server.config import ModelConfig
from tgi_server.layers.attention import Attention
from tgi_server.layers.rope import cos_sin_table
from tgi_server.layers.weights import Weights
from tgi_server.models.decoder import Decoder
from tgi_server.models.window import sliding_window


def load(weights: Weights, config: ModelConfig) -> Decoder:
    cos_sin = cos_sin_table(config, weights.device)
    window = sliding_window(config, default=4096)  # what transformers assumes
    return Decoder(weights, config, lambda at, _layer: Attention(at, config, cos_sin, window=window))
