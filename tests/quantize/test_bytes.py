"""What `quantize` writes in compressed-tensors' layouts is served and loaded by transformers as what it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.quantization.test_int8_inputs import own_arithmetic
from tests.quantization.test_served import TOKENS, load
from tests.quantize.test_command import model, quantize
from tests.quantize.test_solve import inputs, weight
from tgi_kernels.quant_weight import dequantise
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.quantization.byte_codes import nearest_e4m3, nearest_int8
from tgi_server.quantization.detect import find_scheme
from tgi_server.quantize.methods.compressed_tensors import Fp8Method, W8A8Method

__all__ = ["inputs", "model", "weight"]

METHODS = {
    "fp8": ["--method", "fp8", "--samples", "4"],
    "fp8 without statistics": ["--method", "fp8", "--samples", "0"],
    "w8a8": ["--method", "w8a8", "--samples", "4"],
    "w8a8 without statistics": ["--method", "w8a8", "--samples", "0"],
    "w8a16": ["--method", "w8a16"],
    "w8a16 in groups": ["--method", "w8a16", "--group-size", "32"],
}


def stood_for(folder: Path, original: Path, *, is_scaled: bool) -> dict[str, Tensor]:
    """The tensors that `folder` has; nearly the original's, unless columns were scaled."""
    checkpoint, config = Checkpoint(folder), ModelConfig.from_folder(folder)
    scheme = find_scheme(config.raw, checkpoint)
    assert scheme is not None
    tensors = load_file(original / "model.safetensors")
    for name, tensor in tensors.items():
        matrix = name.removesuffix(".weight")
        if scheme.covers(checkpoint, matrix):
            tensors[name] = dequantise(scheme.read(checkpoint, matrix, *tensor.shape), torch.float32)
            off = float((tensors[name] - tensor).norm())
            assert off > 0 and (is_scaled or off < 0.2 * float(tensor.norm()))
        else:
            tensors[name] = checkpoint.tensor(name)
    return tensors


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_served_and_loaded_by_transformers_as_what_it_stands_for(
    model: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    assert quantize(model, out, *METHODS[method]) == 0
    assert "verdict: good" in capsys.readouterr().out
    tensors = stood_for(out, model, is_scaled=method == "w8a8")
    dense.mkdir()
    save_file(tensors, dense / "model.safetensors")
    (dense / "config.json").write_text((model / "config.json").read_text())
    got, want = load(out).step({"a": TOKENS})["a"], load(dense).step({"a": TOKENS})["a"]
    assert torch.equal(got, want) is not method.startswith("w8a8"), "that one rounds its inputs"
    pytest.importorskip("compressed_tensors")
    if method.startswith("w8a8"):
        rounded = own_arithmetic(
            dense, json.loads((out / "config.json").read_text())["quantization_config"], None
        )
        assert (got - rounded).abs().mean() < 0.5 * (want - rounded).abs().mean()
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.bfloat16(), tensors[name].bfloat16()), (
            name
        )  # its package rounds to scales' type


# ---- codes


def test_float8_by_statistics_loses_far_less_of_the_products_than_rounding(
    weight: Tensor, inputs: Tensor
) -> None:
    weight[5] = 0

    def lost(hessian: Tensor | None) -> float:
        tensors = Fp8Method().quantise({"m": weight.clone()}, hessian)
        assert tensors["m.weight"].dtype == torch.float8_e4m3fn and tensors["m.weight_scale"].shape == (48, 1)
        dense = tensors["m.weight"].float() * tensors["m.weight_scale"].float()
        assert bool(dense.isfinite().all()) and not dense[5].any()
        return float((inputs @ (dense - weight).T).norm())

    assert lost(inputs.T @ inputs) < 0.6 * lost(None)


def test_scaled_columns_make_whole_numbers_of_inputs_and_weights_lose_less(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, weight.shape[1], generator=generator)
    x[:, 3] *= 40  # one input that leaves the others few steps
    hessian = x.T @ x
    method = W8A8Method()

    def lost(scales: Tensor) -> float:
        stored = method.quantise({"m": weight * scales}, hessian / (scales[:, None] * scales))
        dense = stored["m.weight"].float() * stored["m.weight_scale"].float()
        own = x / scales
        steps = own.abs().amax(1, keepdim=True) / 127.5
        return float(((own / steps).round() * steps @ dense.T - x @ weight.T).norm())

    scales = method.column_scales(weight, hessian)
    assert bool((scales > 0).all()) and lost(scales) < 0.5 * lost(torch.ones_like(scales))


def test_float8_is_the_nearest_number_and_reaches_the_largest(weight: Tensor) -> None:
    weight[5] = 0
    found = nearest_e4m3(weight)
    dense = dequantise(found, torch.float32)
    normal = weight.abs() > found.scales / 64
    assert bool(((dense - weight).abs() <= weight.abs() / 16 + 1e-9)[normal].all())
    assert bool(((dense - weight).abs() <= found.scales / 1024)[~normal].all())
    largest = (dense.abs().amax(1) / found.scales[:, 0])[weight.abs().amax(1) > 0]
    assert int(largest.min()) >= 416 and int(largest.max()) == 448


@pytest.mark.parametrize("size", [32, 192])
def test_whole_numbers_are_the_nearest_steps(weight: Tensor, size: int) -> None:
    weight[5, :32] = 0
    found = nearest_int8(weight, size)
    scales = found.scales.float().repeat_interleave(size, 1)
    assert bool(((dequantise(found, torch.float32) - weight).abs() <= 0.76 * scales).all())
    assert int(found.codes.min()) == 1 and int(found.codes.max()) == 255
