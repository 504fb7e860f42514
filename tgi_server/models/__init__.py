"""The architectures that are served, by config.json's `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from tgi_server.checkpoint.transfer import Transfer
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.layers.weights import Source, Weights
from tgi_server.models import llama, mistral, qwen2, qwen3
from tgi_server.models.decoder import Decoder
from tgi_server.quantization.detect import find_scheme
from tgi_server.quantization.on_load import chosen_scheme

ARCHITECTURES: Final[dict[str, Callable[[Weights, ModelConfig], Decoder]]] = {
    "llama": llama.load,
    "mistral": mistral.load,
    "qwen2": qwen2.load,
    "qwen3": qwen3.load,
}


def load_model(
    checkpoint: Source,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str = "",
    *,
    deterministic: bool = False,
) -> Decoder:
    """The decoder `config` describes, its weights read from `checkpoint` onto `device`.

    `dtype` is the type of activations. `quantize` is the format that was asked for, if any: the checkpoint's own, or
    one its dense matrices get. `deterministic`: no token's bits depend on others on GPUs either where matrices are
    quantised. Raises StartupError if the architecture is not supported, or if checkpoint, config and
    format do not fit.
    """
    load = ARCHITECTURES.get(config.model_type)
    if load is None:
        own_code = "; code of its own (auto_map) is never run, --trust-remote-code changes nothing"
        raise StartupError(
            f"{checkpoint.folder}: model_type is {config.model_type!r}; served are {', '.join(ARCHITECTURES)}"
            + (own_code if config.raw.get("auto_map") else "")
        )
    if deterministic and device.type == "cuda":
        _check_deterministic(torch.cuda.get_device_capability(device))
    with torch.inference_mode():
        scheme = find_scheme(config.raw, checkpoint)
        if quantize:
            scheme = chosen_scheme(quantize, scheme, checkpoint.folder)
        transfer = Transfer(device) if device.type == "cuda" else None
        weights = Weights(checkpoint, device, dtype, transfer, scheme=scheme, deterministic=deterministic)
        model = load(weights, config).eval()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what is still on its way comes from memory that goes
        # Copies that loading made and dropped; the allocator would keep them from the KV cache, which is one piece.
        torch.cuda.empty_cache()
    return model


def _check_deterministic(capability: tuple[int, int]) -> None:
    """Raises StartupError for GPUs whose products are a library's."""
    if capability != (9, 0):
        major, minor = capability
        raise StartupError(
            f"--deterministic: this GPU has compute capability {major}.{minor}, where products are a library's, whose "
            "bits depend on the number of tokens. Leave it out, take a Hopper GPU (9.0), or choose --device cpu"
        )
