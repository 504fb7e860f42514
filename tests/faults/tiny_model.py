"""A whole model that is loaded in a moment: random weights of Llama's shape and a vocabulary of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.text.tiny import write_tiny_folder

VOCAB, HIDDEN, INNER, POSITIONS = 300, 64, 64, 512


def tensors(layers: int = 1) -> dict[str, Tensor]:
    """The same every time."""
    torch.manual_seed(5)
    block = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up", "down")},
    }
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def write_model(folder: Path, weights: dict[str, Tensor] | None = None, **config: object) -> Path:
    """A folder to serve. config: keys of config.json to set, or to take away if None."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_folder(folder)
    save_file(tensors() if weights is None else weights, folder / "model.safetensors")
    path = folder / "config.json"
    merged = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder
