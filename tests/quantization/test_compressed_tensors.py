"""compressed-tensors checkpoints become the weights that their own package reads from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.quantization.held import Held, read
from tgi_kernels.quant_weight import dequantise
from tgi_server.errors import StartupError
from tgi_server.quantization.detect import scheme_of

GENERATOR = torch.Generator().manual_seed(11)


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_are_read_as_their_own_package_reads_them(
    bits: int, symmetric: bool, strategy: str
) -> None:
    package = pytest.importorskip("compressed_tensors")
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights |= {"group_size": 32} if strategy == "group" else {}
    scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = package.compressors.PackedQuantizationCompressor
    weight = torch.randn(40, 96, generator=GENERATOR) * 0.1
    groups, half = (3 if strategy == "group" else 1), 1 << (bits - 1)
    scale = (weight.abs().unflatten(1, (groups, -1)).amax(2) / half).bfloat16()
    state = {"weight": weight.bfloat16(), "weight_scale": scale}
    if not symmetric:
        generator = torch.Generator().manual_seed(9)
        state["weight_zero_point"] = torch.randint(
            -half, half, scale.shape, generator=generator, dtype=torch.int8
        )
    packed = compressor.compress(state, scheme)
    unpacked = compressor.decompress(packed, scheme)["weight"]
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    found = read(section, packed, 40, 96)
    assert torch.equal(dequantise(found, torch.bfloat16), unpacked.bfloat16())


STRATEGIES = {
    "tensor": ({}, (1,)),
    "channel": ({}, (40, 1)),
    "group": ({"group_size": 32}, (40, 3)),
    "block": ({"block_structure": [16, 64]}, (3, 2)),
}
PACKAGED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    # format, weights, input_activations
    "float-quantized": (
        "float-quantized",
        {"num_bits": 8, "type": "float"},
        {"num_bits": 8, "type": "float"},
    ),
    "naive fp8": ("naive-quantized", {"num_bits": 8, "type": "float"}, None),
    "int-quantized": ("int-quantized", {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "int"}),
    "naive int8": ("naive-quantized", {"num_bits": 8, "type": "int"}, None),
    "naive int5": ("naive-quantized", {"num_bits": 5, "type": "int"}, None),
    "zero points": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False}, None),
}


def compressed(
    format: str, weights: dict[str, Any], inputs: dict[str, Any] | None, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The config, the tensors that the package stores, and the matrix that it reads from them."""
    package = pytest.importorskip("compressed_tensors")
    if inputs is not None:
        inputs = inputs | {"strategy": "token", "dynamic": True, "symmetric": True}
    scheme = package.quantization.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=format
    )
    compressor = package.compressors.BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    group = scheme.model_dump(mode="json")
    section = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return section, stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", PACKAGED)
def test_bytes_of_compressed_tensors_are_read_as_their_own_package_reads_them(
    case: str, strategy: str
) -> None:
    format, weights, inputs = PACKAGED[case]
    more, shape = STRATEGIES[strategy]
    scales = (
        (torch.rand(shape, generator=GENERATOR) + 0.01) * (0.02 if weights["type"] == "int" else 0.1)
    ).bfloat16()
    state = {"weight": torch.randn(40, 96, generator=GENERATOR).bfloat16(), "weight_scale": scales}
    if weights.get("symmetric") is False:
        state["weight_zero_point"] = torch.randint(-128, 128, shape, generator=GENERATOR).to(torch.int8)
    section, stored, want = compressed(format, weights | {"strategy": strategy} | more, inputs, state)
    found = read(section, stored, 40, 96)
    assert torch.equal(dequantise(found, torch.bfloat16), want.bfloat16())
    assert dequantise(found, torch.float32).unique().numel() > 20


@pytest.mark.parametrize("bits", [4, 8])
def test_microscaling_formats_are_read_as_their_own_package_writes_them(bits: int) -> None:
    format = "mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized"
    weights = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32}
    powers = torch.exp2(torch.randint(-6, 6, (40, 3), generator=GENERATOR).float())
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    exact = grid[torch.randint(0, 15, (40, 96), generator=GENERATOR)] * powers.repeat_interleave(32, 1)
    state = {"weight": exact.bfloat16(), "weight_scale": powers.bfloat16()}
    if bits == 4:
        section, stored, read_back = compressed(format, weights | {"scale_dtype": "torch.uint8"}, None, state)
        assert torch.equal(read_back.float(), exact)
    else:
        section, stored, _ = compressed("naive-quantized", weights, None, state)
        section["config_groups"]["group_0"]["format"] = section["format"] = format
        stored["weight_scale"] = (powers.log2() + 127).to(torch.uint8)
    found = read(section, stored, 40, 96)
    assert torch.equal(dequantise(found, torch.float32), exact)


def test_settings_are_those_of_the_closest_target_whatever_their_order() -> None:
    def group(bits: int, *targets: str, format: str | None = None, kind: str = "int") -> dict[str, Any]:
        weights = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": True}
        return {"targets": list(targets), "weights": weights, "format": format}

    groups = {
        "a": group(4, "Linear", format="pack-quantized"),
        "b": group(8, "re:.*down_proj", format="float-quantized", kind="float"),
        "c": group(8, "x.1.down_proj", format="int-quantized"),
    }
    section = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups,
        "ignore": ["re:.*router"],
    }  # fmt: skip
    scheme = scheme_of({"quantization_config": section}, Path("model"))
    assert scheme is not None and scheme.title == "compressed-tensors 4, 8 bit, fp8"
    scale = torch.ones(8, 1).bfloat16()
    stored = {
        "x.up_proj": {"weight_packed": torch.zeros(8, 4, dtype=torch.int32), "weight_scale": scale},
        "x.0.down_proj": {"weight": torch.ones(8, 32).to(torch.float8_e4m3fn), "weight_scale": scale},
        "x.1.down_proj": {"weight": torch.ones(8, 32).to(torch.int8), "weight_scale": scale},
    }
    kinds = {}
    for name, leaves in stored.items():
        held = Held({f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()})
        assert scheme.covers(held, name)
        weight = scheme.read(held, name, 8, 32)
        kinds[name] = weight.values, weight.bits
    assert kinds == {
        "x.up_proj": ("integer", 4), "x.0.down_proj": ("e4m3", 8), "x.1.down_proj": ("integer", 8)
    }  # fmt: skip
    ignored = Held({"x.router.weight": torch.ones(8, 32), "x.router.weight_scale": scale})
    with pytest.raises(StartupError, match=r"x.router has a weight_scale, but .* has it under `ignore`"):
        scheme.read(ignored, "x.router", 8, 32)
