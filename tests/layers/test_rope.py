"""Rotary tables equal those of transformers for every scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.layers.rope import cos_sin_table

BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama 3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "yarn": YARN,
    "yarn with a blend of its own": YARN | {"beta_fast": 64, "beta_slow": 2},
    "yarn without whole dimensions": YARN | {"truncate": False},
    "yarn with an amplitude": YARN | {"attention_factor": 1.25},
    "yarn as DeepSeek sets it": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn in one dimension": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def table_of(config: dict[str, Any]) -> torch.Tensor:
    return cos_sin_table(ModelConfig.from_dict({"model_type": "llama"} | config, {}), torch.device("cpu"))


def expected_table(config: dict[str, Any]) -> torch.Tensor:
    rotary = LlamaRotaryEmbedding(LlamaConfig(**config))
    positions = torch.arange(config["max_position_embeddings"])[None]
    cos, sin = rotary(torch.zeros(1), positions)  # both repeat their half
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_table_is_the_one_transformers_computes(name: str, theta: float) -> None:
    config = BASE | {"rope_parameters": SCALINGS[name] | {"rope_theta": theta}}
    table, expected = table_of(config), expected_table(config)
    assert table.shape == (8192, 64)
    # One unit in the last place of a frequency, 6e-8, times position 8192.
    torch.testing.assert_close(table, expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(table[:64], expected[:64], rtol=0, atol=5e-6)


def test_the_older_spelling_of_scalings_is_read() -> None:
    old = BASE | {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = BASE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    assert torch.equal(table_of(old), table_of(new))


def test_part_of_the_dimensions_may_turn() -> None:
    table = table_of(BASE | {"partial_rotary_factor": 0.25})
    assert table.shape == (8192, 16)
    assert table[1, 0] == torch.tensor(1.0).cos()


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "su"}, "rope_type is 'su'; supported are default, dynamic, linear, llama3, yarn"),
        ({"rope_type": "linear"}, "rope factor is None"),
        ({"rope_type": "linear", "factor": 0}, "rope factor is 0"),
        ({"rope_type": "linear", "factor": "4"}, "rope factor is '4'"),
        ({"rope_type": "yarn", "factor": -1.0}, "rope factor is -1.0"),
        ({**SCALINGS["llama 3.1"], "high_freq_factor": 1.0}, "high_freq_factor 1.0 must be above"),
        ({"rope_type": "default", "partial_rotary_factor": 0.01}, "turns 0 of 64 dimensions"),
    ],
)
def test_a_scaling_that_cannot_be_computed_is_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        table_of(BASE | {"rope_scaling": scaling})
