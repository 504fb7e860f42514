"""A quantised checkpoint serves what the dense model of its dequantised weights serves, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.models.paged import Paged
from tests.quantization import writers
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Quantised, SideBySide
from tgi_server.models import load_model

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENS = torch.randint(1, 101, (40,), generator=torch.Generator().manual_seed(7)).tolist()
Made = tuple[dict[str, Tensor], Tensor]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def gptq(
    bits: int = 4, group_size: int = 32, *, sym: bool = True, shuffled: bool = False, version: int = 1
) -> Callable[[str, Tensor], Made]:
    def make(_name: str, weight: Tensor) -> Made:
        matrix = writers.rounded(weight, bits, group_size, sym=sym, shuffled=shuffled)
        return writers.gptq(matrix, bits, version=version), matrix.dense().float()

    return make


def awq(_name: str, weight: Tensor) -> Made:
    matrix = writers.rounded(weight, 4, 32, sym=False)
    return writers.awq(matrix), matrix.dense().float()


def only_mlp_and_q(name: str, weight: Tensor) -> Made:
    return ({"weight": weight}, weight) if "k_proj" in name or "v_proj" in name else awq(name, weight)


CASES: dict[str, tuple[dict[str, object], Callable[[str, Tensor], Made]]] = {
    "gptq": (GPTQ, gptq()),
    "gptq, 2 bits": (GPTQ | {"bits": 2}, gptq(2)),
    "gptq, 3 bits": (GPTQ | {"bits": 3}, gptq(3)),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, gptq(8)),
    "gptq, one group": (GPTQ | {"group_size": -1}, gptq(4, -1)),
    "gptq, zero points": (GPTQ | {"sym": False}, gptq(sym=False)),
    "gptq, second version": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        gptq(sym=False, version=2),
    ),
    "gptq, ordered columns": (GPTQ | {"desc_act": True}, gptq(shuffled=True)),
    "awq": (AWQ, awq),
    "awq beside dense matrices": (AWQ, only_mlp_and_q),
}


def load(folder: Path, quantize: str = "") -> Paged:
    config = ModelConfig.from_folder(folder)
    return Paged(load_model(Checkpoint(folder), config, torch.device("cpu"), torch.float32, quantize), config)


def write_model(folder: Path, **shape: int) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | shape), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
    model.save_pretrained(folder)


def write_both(parent: Path, section: dict[str, object], make: object) -> tuple[Path, Path]:
    """Folders of a model as a format stores it and of the dense one that it stands for."""
    quantised, dense = parent / "quantised", parent / "dense"
    for folder in (quantised, dense):
        write_model(folder)
    save_file(writers.quantise_folder(quantised, section, make), dense / "model.safetensors")
    return quantised, dense


@pytest.mark.parametrize("case", CASES)
def test_logits_have_the_bits_of_the_dequantised_model(tmp_path: Path, case: str) -> None:
    section, make = CASES[case]
    quantised, dense = write_both(tmp_path, section, make)
    served, expected = load(quantised), load(dense)
    kinds = {type(layer.product) for layer in served.model.modules() if isinstance(layer, Linear)}
    assert Quantised in kinds and (SideBySide in kinds) == (case == "awq beside dense matrices")
    logits, want = served.step({"a": TOKENS})["a"], expected.step({"a": TOKENS})["a"]
    if section.get("desc_act"):  # the sum goes over columns in another order
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
    else:
        assert torch.equal(logits, want)
    one_by_one = load(quantised)
    assert torch.equal(torch.cat([one_by_one.step({"a": [token]})["a"] for token in TOKENS]), logits)


def test_the_settings_of_older_tools_are_found_in_files_of_their_own(tmp_path: Path) -> None:
    for name, (section, make) in (
        ("quantize_config.json", CASES["gptq"]),
        ("quant_config.json", CASES["awq"]),
    ):
        folder = tmp_path / name
        write_model(folder)
        writers.quantise_folder(folder, section, make)
        expected = load(folder).step({"a": TOKENS})["a"]
        config = json.loads((folder / "config.json").read_text())
        older = config.pop("quantization_config")
        del older["quant_method"]
        if name == "quant_config.json":
            older |= {"w_bit": older.pop("bits"), "q_group_size": older.pop("group_size"), "version": "GEMM"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps(older))
        assert torch.equal(load(folder).step({"a": TOKENS})["a"], expected)
