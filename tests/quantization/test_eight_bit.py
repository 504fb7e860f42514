"""FP8 and int8 checkpoints become the weights that their publishers mean, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.quantization import writers
from tests.quantization.held import read
from tests.quantization.test_served import TOKENS, load, write_both, write_model
from tgi_kernels.quant_weight import dequantise
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import SideBySide
from tgi_server.quantization.detect import scheme_of

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = FP8 | {"weight_block_size": [128, 128]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}
GENERATOR = torch.Generator().manual_seed(11)


def every_code(out: int, columns: int) -> Tensor:
    """All codes of e4m3 that are numbers, in each row in another order; [out, columns]."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    places = torch.arange(out)[:, None] * 7 + torch.arange(columns)
    return codes[places % len(codes)].view(torch.float8_e4m3fn)


def scales_of(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) + 0.01


def scaled(weight: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """Each tile of the matrix times its own scale: one rounding, to float32."""
    dense = weight.double()
    for i in range(ceil(len(dense) / rows)):
        for j in range(ceil(dense.shape[1] / columns)):
            tile = dense[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            tile *= float(scales.reshape(-1, ceil(dense.shape[1] / columns))[i, j])
    return dense.float()


CASES: dict[str, tuple[dict[str, Any], str, tuple[int, ...], tuple[int, int]]] = {
    # section, scale tensor, its shape, rows and columns that share a number; of 200 rows and 320 columns
    "a number": (FP8, "weight_scale", (), (200, 320)),
    "a number, in a list": (FP8, "weight_scale", (1,), (200, 320)),
    "transformers' number": (FP8, "weight_scale_inv", (), (200, 320)),
    "rows": (FP8, "weight_scale", (200,), (1, 320)),
    "rows, upright": (FP8, "weight_scale", (200, 1), (1, 320)),
    "blocks": (BLOCKS, "weight_scale_inv", (2, 3), (128, 128)),
    "odd blocks": (BLOCKS | {"weight_block_size": [48, 64]}, "weight_scale_inv", (5, 5), (48, 64)),
    "fbgemm": (FBGEMM, "weight_scale", (200, 1), (1, 320)),
    "modelopt": (MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "weight_scale", (200,), (1, 320)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_code_of_fp8_is_read_as_published(case: str) -> None:
    section, leaf, shape, tile = CASES[case]
    weight, scales = every_code(200, 320), scales_of(*shape)
    found = read(section, {"weight": weight, leaf: scales}, 200, 320)
    assert torch.equal(dequantise(found, torch.float32), scaled(weight, scales, *tile))


def test_scales_that_are_powers_of_two_are_read_as_such() -> None:
    exponents = torch.tensor([[1, 100, 127], [128, 130, 200]], dtype=torch.uint8)
    weight = every_code(200, 320)
    want = scaled(weight, 2.0 ** (exponents.double() - 127), 128, 128)
    for stored in (exponents, exponents.view(torch.float8_e8m0fnu)):
        found = read(BLOCKS, {"weight": weight, "weight_scale_inv": stored}, 200, 320)
        assert torch.equal(dequantise(found, torch.float32), want)


def test_blocks_are_read_as_transformers_reads_them() -> None:
    oracle = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scales = every_code(256, 384), scales_of(2, 3)
    want = oracle.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    found = read(BLOCKS, {"weight": weight, "weight_scale_inv": scales}, 256, 384)
    assert torch.equal(dequantise(found, torch.float32), want)


# ---- whole models

Made = tuple[dict[str, Tensor], Tensor]


def e4m3(tile: tuple[int, int] | None, leaf: str, *, static: bool = False) -> Callable[[str, Tensor], Made]:
    """Matrices in tiles of their own scale; None: one tile."""

    def make(_name: str, weight: Tensor) -> Made:
        rows, columns = tile or tuple(weight.shape)
        columns = min(columns, weight.shape[1])
        scales = torch.empty(ceil(len(weight) / rows), ceil(weight.shape[1] / columns))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[at].abs().max() / 448
                codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
        stored = scales.reshape(()) if tile is None else scales
        tensors = {"weight": codes, leaf: stored} | ({"input_scale": torch.tensor(0.01)} if static else {})
        return tensors, scaled(codes, scales, rows, columns)

    return make


def int8(_name: str, weight: Tensor) -> Made:
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, (codes.double() * scales.double()).float()


def fp8_without_v(name: str, weight: Tensor) -> Made:
    return ({"weight": weight}, weight) if "v_proj" in name else e4m3(None, "weight_scale")(name, weight)


def int_quantised(inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                "input_activations": inputs,
            }
        },
        "ignore": ["lm_head"],
    }


INT8: dict[str, Any] = {"num_bits": 8, "type": "int"}
W8A8 = int_quantised(INT8 | {"strategy": "token", "dynamic": True})
SERVED: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Made]]] = {
    "a scale a matrix": (FP8 | {"activation_scheme": "static"}, e4m3(None, "weight_scale", static=True)),
    "a scale a row": (FBGEMM, e4m3((1, 10000), "weight_scale")),
    "blocks": (BLOCKS | {"weight_block_size": [64, 64]}, e4m3((64, 64), "weight_scale_inv")),
    "modelopt": (MODELOPT, e4m3(None, "weight_scale", static=True)),
    "fp8 beside a dense matrix": (FP8, fp8_without_v),
    "int8": (int_quantised(None), int8),
    "int8, inputs not around 0": (int_quantised(INT8 | {"dynamic": True, "symmetric": False}), int8),
}


@pytest.mark.parametrize("case", SERVED)
def test_logits_have_the_bits_of_the_dequantised_model(tmp_path: Path, case: str) -> None:
    section, make = SERVED[case]
    quantised, dense = write_both(tmp_path, section, make)
    served = load(quantised)
    products = [layer.product for layer in served.model.modules() if isinstance(layer, Linear)]
    merged = not any(isinstance(product, SideBySide) for product in products)
    assert merged == (case != "fp8 beside a dense matrix"), "parts with scales of their own are one matrix"
    assert torch.equal(served.step({"a": TOKENS})["a"], load(dense).step({"a": TOKENS})["a"])


@pytest.mark.parametrize(
    ("section", "extra", "inputs", "scale", "bound"),
    [
        (FP8, {}, "rows", None, float("inf")),
        (FP8, {"input_scale": torch.tensor(0.5)}, "rows", None, float("inf")),
        (
            FP8 | {"activation_scheme": "static"},
            {"input_scale": torch.tensor([0.5, 0.25])},
            "rows",
            0.5,
            float("inf"),
        ),
        (FBGEMM, {}, "rows", None, 1200.0),
        (MODELOPT, {"input_scale": torch.tensor(0.25).bfloat16()}, "rows", 0.25, float("inf")),
    ],
)
def test_how_inputs_are_rounded_is_what_the_config_says(
    section: dict[str, Any], extra: dict[str, Tensor], inputs: str, scale: float | None, bound: float
) -> None:
    tensors = {"weight": every_code(200, 320), "weight_scale": scales_of(200, 1)} | extra
    if section is MODELOPT:
        tensors["weight_scale"] = torch.tensor(0.5)
    found = read(section, tensors, 200, 320)
    assert (found.inputs, found.input_bound) == (inputs, bound)
    assert found.input_scale is None if scale is None else found.input_scale is not None
    if found.input_scale is not None:
        assert found.input_scale.tolist() == [scale]


def test_inputs_of_blocks_have_scales_for_blocks_and_weights_alone_have_none() -> None:
    tensors = {"weight": every_code(200, 320), "weight_scale_inv": scales_of(2, 3)}
    assert read(BLOCKS, tensors, 200, 320).inputs == "blocks"
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"a": {"targets": ["Linear"], "weights": weights}},
    }
    tensors = {"weight": every_code(200, 320), "weight_scale": scales_of(200, 1)}
    assert read(section, tensors, 200, 320).inputs == "exact"
    section["config_groups"] = {
        "a": {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    }
    assert read(section, tensors, 200, 320).inputs == "rows"


def test_modelopts_settings_are_found_in_a_file_of_their_own(tmp_path: Path) -> None:
    section, make = SERVED["modelopt"]
    write_model(tmp_path)
    writers.quantise_folder(tmp_path, section, make)
    expected = load(tmp_path).step({"a": TOKENS})["a"]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    assert torch.equal(load(tmp_path).step({"a": TOKENS})["a"], expected)


# ---- while loading


def test_a_dense_model_becomes_float8_while_it_loads_but_for_its_head(tmp_path: Path) -> None:
    quantised, dense = tmp_path / "quantised", tmp_path / "dense"
    for folder in (quantised, dense):
        write_model(folder)

    def make(_name: str, weight: Tensor) -> Made:
        scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16().float()
        codes = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scales}, weight

    writers.quantise_folder(quantised, FP8, make)
    want = load(quantised).step({"a": TOKENS})["a"]
    assert torch.equal(load(dense, "fp8").step({"a": TOKENS})["a"], want)
    assert torch.equal(load(quantised, "fp8").step({"a": TOKENS})["a"], want), "it is of that format already"


# ---- what is refused

FAULTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (
        FP8,
        lambda t: t["weight"].view(torch.uint8)[3, 5:8].fill_(0xFF),
        r"3 of 64000 weights in m.weight are NaN",
    ),
    "e5m2": (
        FP8,
        lambda t: t.update(weight=t["weight"].float().to(torch.float8_e5m2)),
        r"m.weight is stored as torch.float8_e5m2; its format asks for torch.float8_e4m3fn",
    ),
    "not quantised": (FP8, lambda t: t.update(weight=t["weight"].bfloat16()), r"stored as torch.bfloat16"),
    "NaN scale": (FP8, lambda t: t["weight_scale"][4].fill_(torch.nan), r"1 of 200 scales in m.weight_scale"),
    "zero scale": (FP8, lambda t: t["weight_scale"][7:9].zero_(), r"2 of 200 .* no positive .*\(0 is one\)"),
    "infinite scale": (FP8, lambda t: t["weight_scale"][0].fill_(torch.inf), r"\(inf is one\)"),
    "negative scale": (FP8, lambda t: t["weight_scale"].neg_(), r"200 of 200 scales"),
    "scales of ints": (
        FP8,
        lambda t: t.update(weight_scale=t["weight_scale"].int()),
        r"m.weight_scale is stored as torch.int32",
    ),
    "too few scales": (
        FP8,
        lambda t: t.update(weight_scale=t["weight_scale"][:100]),
        r"m.weight_scale has shape \(100, 1\); 200 rows and 320 columns in tiles of 1×320 ask for \(200, 1\)",
    ),
    "rows for blocks": (BLOCKS, lambda _: None, r"shape \(200, 1\); .* of 128×128 ask for \(2, 3\)"),
    "both scales": (
        FP8,
        lambda t: t.update(weight_scale_inv=t["weight_scale"]),
        r"holds m.weight_scale and m.weight_scale_inv; a matrix has one of the two",
    ),
    "static without scales": (FP8 | {"activation_scheme": "static"}, lambda _: None, r"no m.input_scale"),
    "bad input scale": (
        FP8,
        lambda t: t.update(input_scale=torch.tensor(0.0)),
        r"1 of 1 scales in m.input_scale are no positive numbers",
    ),
    "no weight": (FP8, lambda t: t.pop("weight"), r"m.weight has shape None"),
    "another weight": (FP8, lambda t: t.update(weight=t["weight"][1:]), r"m.weight has shape \(199, 320\)"),
    "integers out of range": (
        W8A8 | {
            "format": "naive-quantized",
            "config_groups": {
                "g": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "strategy": "channel"},
                }
            },
        },
        lambda t: t.update(weight=torch.full((200, 320), 8, dtype=torch.int8)),
        r"m.weight holds numbers from 8 to 8; its config says 4 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contradiction_in_fp8_is_refused_with_name_and_numbers(fault: str) -> None:
    section, change, message = FAULTS[fault]
    tensors = {"weight": every_code(200, 320), "weight_scale": scales_of(200, 1)}
    change(tensors)
    with pytest.raises(StartupError, match=message):
        read(section, tensors, 200, 320)


def ct(**changes: Any) -> dict[str, Any]:
    """A config of W8A8 with changes to its only group, or to the weights of it."""
    group = dict(W8A8["config_groups"]["group_0"])
    own = {
        key: changes.pop(key) for key in tuple(changes) if key in ("input_activations", "output_activations")
    }
    top = {key: changes.pop(key) for key in tuple(changes) if key not in group["weights"] | {"actorder": 1}}
    group |= own | {"weights": group["weights"] | changes}
    return W8A8 | {"config_groups": {"g": group}} | top


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; served are 'e4m3'"),
        (FP8 | {"activation_scheme": "none"}, "activation_scheme is 'none'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size is \[128\]; two positive numbers"),
        (FP8 | {"weight_block_size": [128, True]}, "weight_block_size"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; a list"),
        (FBGEMM | {"activation_scale_ub": -1}, "activation_scale_ub is -1"),
        (MODELOPT | {"quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; served are 'FP8'"),
        ({"quant_method": "modelopt", "quantization": []}, r"quantization is \[\]"),
        (ct(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'; served are"),
        (ct(format="mxfp6-pack-quantized"), "format is 'mxfp6-pack-quantized'"),
        (ct(format="mixed-precision"), "format is 'mixed-precision'"),
        (ct(type="float"), "int-quantized: type is 'float'"),
        (ct(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (ct(strategy="block"), "no block_structure"),
        (ct(actorder="group"), "actorder is 'group'"),
        (ct(sparsity_config={"format": "sparse-24-bitmask"}), "format is 'sparse-24-bitmask'"),
        (ct(transform_config={"config_groups": {}}), "transform_config rotates activations"),
        (ct(ignore="lm_head"), "ignore is 'lm_head'; a list of names"),
        (ct(ignore=["re:("]), r"'re:\(' is no regular expression"),
        (ct(input_activations={"num_bits": 4}), "weights of 8 bits beside input_activations of 4 .W8A4."),
        (ct(num_bits=4), "weights of 4 bits beside input_activations of 8 .W4A8. are not served"),
        (ct(output_activations={"num_bits": 8}), "output_activations are not served"),
    ],
)
def test_a_setting_that_is_not_served_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        scheme_of({"quantization_config": section}, Path("model"))
