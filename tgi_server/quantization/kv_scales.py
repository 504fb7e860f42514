"""The scales that a checkpoint was calibrated with for a KV cache of float8, and what becomes of them."""

from __future__ import annotations

from typing import Final

import torch

from tgi_server.errors import StartupError
from tgi_server.quantization.eight_bit import check_positive
from tgi_server.quantization.scheme import Tensors, read_as

LARGEST: Final = 448  # of float8 (e4m3)

_LEAVES: Final = ("k_scale", "v_scale", "kv_scale")


def kv_scale_warning(tensors: Tensors) -> str:
    """What whoever asks for a float8 cache must know: it holds keys and values as they are, without scales.

    float8 has the same precision over 15 powers of two, so that a scale below 1, which says that all values fit,
    changes little. Raises StartupError for a scale above 1: larger values would be cut off; and for damaged ones.
    """
    found: dict[str, float] = {}
    for name in sorted(tensors.names()):
        if name.rpartition(".")[2] in _LEAVES:
            stored = read_as(tensors, name, tensors.shape(name), torch.float32, torch.float16, torch.bfloat16)
            found[name] = float(check_positive(tensors, name, stored).max())
    if not found:
        return (
            "the KV cache is float8, but the checkpoint has no scales for one (k_scale, v_scale): whether keys and "
            f"values stay within ±{LARGEST} is not known, and larger ones are cut off. Compare answers with those of "
            "--kv-cache-dtype auto before you rely on them"
        )
    largest = max(found, key=lambda name: found[name])
    if found[largest] > 1:
        raise StartupError(
            f"{tensors.folder}: {largest} is {found[largest]:g}, so values reach {found[largest] * LARGEST:.0f}; a "
            f"float8 KV cache holds them without scales, up to {LARGEST}. Leave out --kv-cache-dtype fp8"
        )
    return (
        f"the KV cache is float8 and holds keys and values as they are: the checkpoint's {len(found)} scales, from "
        f"{min(found.values()):g} to {found[largest]:g}, are not applied. By them all values stay within ±{LARGEST}; "
        "the smallest are kept less exactly than with scales"
    )
