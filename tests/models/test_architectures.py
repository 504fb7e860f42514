"""Tiny random checkpoints of every architecture agree with transformers, however tokens are batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.models.paged import Paged
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.models import load_model

# Odd on purpose: three query heads to a key head, an inner size that is no power of two.
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied, biases": LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama 3.1 rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "llama, gelu": LlamaConfig(**SHAPE, hidden_act="gelu"),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=23),
    "mistral, wide heads": MistralConfig(**SHAPE, head_dim=32),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2, window in later layers": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=17, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}
TOKENS = torch.randint(1, 101, (50,), generator=torch.Generator().manual_seed(7)).tolist()
OTHERS = torch.randint(1, 101, (33,), generator=torch.Generator().manual_seed(8)).tolist()
Pair = tuple[PreTrainedModel, Path]
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Weights large enough that a wrong one shows, biases and norms that are not the neutral ones."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def load(folder: Path) -> Paged:
    config = ModelConfig.from_folder(folder)
    model = load_model(Checkpoint(folder), config, torch.device("cpu"), torch.float32)
    return Paged(model, config)


def expected_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of transformers and the folder it was saved to."""
    model = random_model(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path)
    return tmp_path


def test_logits_agree_with_transformers(pair: Pair) -> None:
    model, folder = pair
    logits = load(folder).step({"a": TOKENS})["a"]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected_logits(model, TOKENS), **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_a_prompt_in_chunks_gives_the_bits_of_the_whole(pair: Pair, chunk: int) -> None:
    _, folder = pair
    whole = load(folder).step({"a": TOKENS})["a"]
    paged = load(folder)
    parts = [paged.step({"a": TOKENS[i : i + chunk]})["a"] for i in range(0, len(TOKENS), chunk)]
    assert torch.equal(torch.cat(parts), whole)


def test_sequences_in_one_step_do_not_touch_each_other(pair: Pair) -> None:
    model, folder = pair
    paged = load(folder)
    first = paged.step({"a": TOKENS[:20], "b": OTHERS[:5]}, padding=3)
    # One decodes, one goes on with its prompt, one begins.
    second = paged.step({"b": OTHERS[5:], "a": TOKENS[20:21], "c": TOKENS[:17]}, padding=2)
    for name, parts, tokens in [
        ("a", [first["a"], second["a"]], TOKENS[:21]),
        ("b", [first["b"], second["b"]], OTHERS),
        ("c", [second["c"]], TOKENS[:17]),
    ]:
        together = torch.cat(parts)
        torch.testing.assert_close(together, expected_logits(model, tokens), **TOLERANCE)
        assert torch.equal(together, load(folder).step({name: tokens})[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    random_model(CONFIGS["qwen3"]).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    logits = load(tmp_path).step({"a": TOKENS})["a"]
    torch.testing.assert_close(logits, expected_logits(model, TOKENS), **TOLERANCE)


def test_shards_give_the_model_of_one_file(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    logits = load(tmp_path).step({"a": TOKENS})["a"]
    torch.testing.assert_close(logits, expected_logits(model, TOKENS), **TOLERANCE)


def test_every_layer_declares_its_cache(llama: Path) -> None:
    specs = load(llama).model.cache_specs
    assert [(spec.kind, spec.kv_heads, spec.head_dim) for spec in specs] == [("pages", 2, 16)] * 3
    assert specs[0].page_values() == 2 * 2 * 16 * 16


# ---- checkpoints that do not fit


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_architecture_names_those_that_are_served(llama: Path) -> None:
    change_config(llama, model_type="mamba")
    with pytest.raises(StartupError, match="model_type is 'mamba'; served are llama, mistral, qwen2, qwen3"):
        load(llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3\."),
        ({"intermediate_size": 80}, r"down_proj\.weight has shape \(96, 88\); .*\(96, 80\)"),
        ({"vocab_size": 100}, r"embed_tokens\.weight has shape \(101, 96\)"),
        ({"num_key_value_heads": 3}, r"k_proj\.weight has shape \(32, 96\)"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported are silu"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"says gptq 4 bit, but none of its \d+ tensors is a \.qweight",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    change_config(llama, **changes)
    with pytest.raises(StartupError, match=message):
        load(llama)


@pytest.mark.parametrize("window", ["wide", -1, True])
def test_a_window_that_is_no_number_is_refused(tmp_path: Path, window: object) -> None:
    random_model(CONFIGS["mistral"]).save_pretrained(tmp_path)
    change_config(tmp_path, sliding_window=window)
    with pytest.raises(StartupError, match="sliding_window is"):
        load(tmp_path)


def test_quantised_weights_are_refused_by_name(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(96, 88, dtype=torch.int8)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(StartupError, match=r"layers\.1\.mlp\.down_proj\.weight is stored as torch\.int8"):
        load(llama)


def test_a_loaded_model_does_not_see_its_files_change(llama: Path) -> None:
    paged = load(llama)
    before = load(llama).step({"a": TOKENS})["a"]
    path = llama / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(paged.step({"a": TOKENS})["a"], before)
