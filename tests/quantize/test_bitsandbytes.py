"""What `quantize` writes in bitsandbytes' layouts is served, and loaded by transformers, as what it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.quantization.make_bitsandbytes import CASES, matrix
from tests.quantization.test_bitsandbytes import read, section_of, stored
from tests.quantization.test_formats import Held
from tests.quantization.test_served import TOKENS, load
from tests.quantize.test_command import make_model, model, quantize
from tests.quantize.test_solve import inputs, weight
from tgi_kernels.quant_weight import dequantise, table
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.quantization.detect import find_scheme
from tgi_server.quantization.on_load import ON_LOAD
from tgi_server.quantize.methods.bitsandbytes import EightBitMethod, FourBitMethod, dynamic_map
from tgi_server.quantize.table_grid import TableGrid

__all__ = ["inputs", "model", "weight"]


def dequantised(folder: Path, original: Path, to: Path) -> Path:
    """A dense model of what the matrices in `folder` stand for."""
    checkpoint, config = Checkpoint(folder), ModelConfig.from_folder(folder)
    scheme = find_scheme(config.raw, checkpoint)
    assert scheme is not None
    to.mkdir()
    tensors = load_file(original / "model.safetensors")
    for name, tensor in tensors.items():
        matrix_name = name.removesuffix(".weight")
        if scheme.covers(checkpoint, matrix_name):
            weight = scheme.read(checkpoint, matrix_name, *tensor.shape)
            tensors[name] = dequantise(weight, torch.float32)
            assert 0 < float((tensors[name] - tensor).norm()) < 0.3 * float(tensor.norm())
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((original / "config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("method", "title"), [("nf4", "bitsandbytes nf4 double"), ("int8", "bitsandbytes int8")]
)
def test_what_is_written_is_served_as_what_it_stands_for(
    model: Path, tmp_path: Path, method: str, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(model, out, "--method", method) == 0
    assert "verdict: " in capsys.readouterr().out
    scheme = find_scheme(ModelConfig.from_folder(out).raw, Checkpoint(out))
    assert scheme is not None and scheme.title == title
    served = load(out).step({"a": TOKENS})["a"]
    dense = dequantised(out, model, tmp_path / "dense")
    assert torch.equal(served, load(dense).step({"a": TOKENS})["a"])
    untouched, before = Checkpoint(out), load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(untouched.tensor(name), before[name])


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_transformers_loads_what_is_written(tmp_path: Path, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    original = make_model(tmp_path / "model", hidden_size=128, num_attention_heads=8)
    assert quantize(original, tmp_path / "out", "--method", method) == 0
    dense = dequantised(tmp_path / "out", original, tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert ("Linear4bit" if method == "nf4" else "Linear8bitLt") in kinds
    ours = load(dense).step({"a": TOKENS})["a"]
    ids = torch.tensor([TOKENS])
    # bitsandbytes rounds activations, to 8 bits or bfloat16; not so the dense model that is made of what it holds.
    with torch.inference_mode():
        assert float((loaded(ids).logits[0] - ours).norm()) <= 0.1 * float(ours.norm())
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).dequantize()
        assert float((exact(ids).logits[0] - ours).norm()) <= 1e-5 * float(ours.norm())


def test_the_config_says_what_transformers_writes(model: Path, tmp_path: Path) -> None:
    assert quantize(model, tmp_path / "out", "--method", "nf4") == 0
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    own = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ).to_dict()
    assert section.keys() <= own.keys()
    same = section.keys() - {"llm_int8_skip_modules", "bnb_4bit_compute_dtype"}
    assert {key: section[key] for key in same} == {key: own[key] for key in same}


def test_double_quantisation_loses_no_more_than_that_of_bitsandbytes() -> None:
    case = "nf4 double"
    rows, columns = CASES[case][:2]
    weight = matrix(case)
    found, theirs = leaves_of(weight, None), stored(case)
    assert {leaf: (tensor.shape, tensor.dtype) for leaf, tensor in found.items() if "state" not in leaf} == {
        leaf: (tensor.shape, tensor.dtype) for leaf, tensor in theirs.items() if "state" not in leaf
    }
    maps = [leaves["weight.nested_quant_map"] for leaves in (found, theirs)]
    torch.testing.assert_close(*maps, rtol=1e-6, atol=0)
    ours, other = (
        float((dequantise(read(section_of(case), leaves, rows, columns), torch.float32) - weight).norm())
        for leaves in (found, theirs)
    )
    assert ours < other


def test_statistics_of_the_inputs_keep_products_nearer_than_rounding_does(
    weight: Tensor, inputs: Tensor
) -> None:
    section = section_of("nf4 double")
    found = read(section, leaves_of(weight, inputs.T @ inputs), *weight.shape)
    plain = ON_LOAD["bitsandbytes-nf4"].read(Held({"m.weight": weight}), "m", *weight.shape)
    ours, other = (
        float((inputs @ (dequantise(made, torch.float32) - weight).T).norm()) for made in (found, plain)
    )
    assert ours < 0.6 * other


def test_a_scale_below_zero_turns_the_table_round_where_that_is_nearer() -> None:
    numbers = table("nf4")
    weight = torch.stack([numbers, -numbers]).repeat(1, 4) * 0.3
    grid = TableGrid(numbers, 64)
    scales, zeros = grid.fit(weight, torch.ones(64))
    torch.testing.assert_close(scales, torch.tensor([[0.3], [-0.3]]))
    torch.testing.assert_close(grid.nearest(weight, scales, zeros) * scales, weight)
    even = TableGrid(torch.tensor([-1.0, 0.0, 1.0]), 64)
    assert bool((even.fit(weight, torch.ones(64))[0] > 0).all()), "nothing to turn round"


def leaves_of(weight: Tensor, hessian: Tensor | None) -> dict[str, Tensor]:
    tensors = FourBitMethod("float32").quantise({"m": weight}, hessian)
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


def test_the_dynamic_map_is_sorted_and_reaches_from_minus_1_to_1() -> None:
    numbers = dynamic_map()
    assert len(numbers.unique()) == 256 and torch.equal(numbers, numbers.sort().values)
    assert float(numbers[-1]) == 1 and bool((numbers == 0).any())


def test_rows_of_zeros_and_columns_that_do_not_fit_are_met() -> None:
    tensors = EightBitMethod().quantise({"m": torch.zeros(3, 16)}, None)
    assert not tensors["m.weight"].any() and not tensors["m.SCB"].any()
    with pytest.raises(StartupError, match="m has 48 columns; nf4 is written for multiples of 32"):
        FourBitMethod("float32").check("m", 48)
