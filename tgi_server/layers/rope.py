"""Tables for rotary embeddings. Su et al. 2021, arXiv:2104.09864; the scalings name their own sources.

Computed in fp32, product by product as training code does: at position 8000 a more exact angle would differ
from the one the model was trained with by up to 5e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError


def cos_sin_table(config: ModelConfig, device: torch.device) -> Tensor:
    """[max_positions, rot_dim] fp32: for each position rot_dim/2 cosines, then as many sines.

    Raises StartupError if config.json asks for a scaling that is unknown or lacks a number.
    """
    scaling = config.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise StartupError(f"config.json: rope_type is {kind!r}; supported are {', '.join(SCALINGS)}")
    frequencies, amplitude = SCALINGS[kind](_frequencies(config), config)
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * amplitude).to(device)


def _frequencies(config: ModelConfig) -> Tensor:
    """Radians per position, [rot_dim / 2] fp32, fastest first."""
    part = _number({**config.raw, **config.rope_scaling}, "partial_rotary_factor", 1.0)
    rot_dim = int(config.head_dim * part)
    if not 0 < part <= 1 or rot_dim < 2 or rot_dim % 2:
        raise StartupError(
            f"config.json: partial_rotary_factor {part} turns {rot_dim} of {config.head_dim} dimensions; "
            "an even number of them is needed"
        )
    exponents = torch.arange(0, rot_dim, 2, dtype=torch.float32) / rot_dim
    return 1.0 / (config.rope_theta**exponents)


def _unscaled(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """As trained. Dynamic NTK scaling is this, too, up to max_positions, and no longer sequence is served."""
    del config
    return frequencies, 1.0


def _linear(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Positions divided by a factor. Chen et al. 2023, arXiv:2306.15595."""
    return frequencies / _number(config.rope_scaling, "factor"), 1.0


def _llama3(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Slow turns slowed by a factor, fast ones left, between them a blend. Llama 3.1, arXiv:2407.21783."""
    scaling = config.rope_scaling
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    original = _number(scaling, "original_max_position_embeddings", config.max_positions)
    if high <= low:
        raise StartupError(f"config.json: rope high_freq_factor {high} must be above low_freq_factor {low}")
    turns = original / (2 * math.pi / frequencies)  # over the length the model was first trained with
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies, 1.0


def _factors(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Each frequency divided by a factor of its own, as GGUF files have Llama 3.1's scaling."""
    factors = config.rope_scaling.get("factors")
    numbers = [f for f in factors if isinstance(f, float) and f > 0] if isinstance(factors, list) else []
    if not isinstance(factors, list) or len(numbers) != len(factors) or len(numbers) != len(frequencies):
        raise StartupError(
            f"config.json: rope factors are {str(factors)[:80]}; {len(frequencies)} positive numbers are needed"
        )
    return frequencies / torch.tensor(numbers), 1.0


def _yarn(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """A blend as in llama3, linear in the dimension; longer q and k. Peng et al. 2023, arXiv:2309.00071."""
    scaling = config.rope_scaling
    original = _number(scaling, "original_max_position_embeddings", config.max_positions)
    factor = _number(scaling, "factor", config.max_positions / original)
    half = len(frequencies)

    def dimension_turning(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(config.rope_theta)

    first = dimension_turning(_number(scaling, "beta_fast", 32.0))
    last = dimension_turning(_number(scaling, "beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    span = last - first or 0.001  # both in one dimension: a step instead of a ramp
    slowed = ((torch.arange(half, dtype=torch.float32) - first) / span).clamp(0, 1)
    return frequencies / factor * slowed + frequencies * (1 - slowed), _yarn_amplitude(scaling, factor)


def _yarn_amplitude(scaling: Mapping[str, object], factor: float) -> float:
    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return amplitude(_number(scaling, "mscale")) / amplitude(_number(scaling, "mscale_all_dim"))
    return amplitude(1.0)


def _number(table: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = default if table.get(key) is None else table[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise StartupError(f"config.json: rope {key} is {value!r}; a positive number is needed")
    return float(value)


SCALINGS: Final[dict[str, Callable[[Tensor, ModelConfig], tuple[Tensor, float]]]] = {
    "default": _unscaled,
    "dynamic": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}
