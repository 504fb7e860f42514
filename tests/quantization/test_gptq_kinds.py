"""GPTQ's other packings: Marlin's order, settings by layer, a quantised head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantization import writers
from tests.quantization.test_formats import GPTQ, Held, read, weight_of
from tests.quantization.test_served import TOKENS, load, write_both, write_model
from tgi_kernels.quant_weight import dequantise
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Quantised
from tgi_server.quantization.detect import scheme_of

MARLIN = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}
# A word's nibbles, lowest first, are these of the eight numbers that a thread feeds to two products.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def marlin(matrix: writers.Matrix) -> dict[str, Tensor]:
    """Code by code: where each thread of a warp finds its operands of mma.m16n8k16, the right one of two by two."""
    codes, scales = matrix.codes.T, matrix.scales.T.contiguous()  # [in, out] and [groups, out]
    columns, out = codes.shape
    words = torch.zeros(columns // 16, out * 2, dtype=torch.int64)
    for strip in range(columns // 16):
        for place in range(out * 2):
            thread, word = place % 128 // 4, place % 4
            pair, row = thread % 4, thread // 4
            held = []
            for half in (0, 8):
                for column in (2 * pair, 2 * pair + 1, 2 * pair + 8, 2 * pair + 9):
                    held.append(int(codes[16 * strip + column, place // 128 * 64 + 16 * word + row + half]))
            words[strip, place] = sum(held[NIBBLES[i]] << (4 * i) for i in range(8))
    if len(scales) > 1:
        places = [64 * block + 8 * j + i for block in range(out // 64) for i in range(8) for j in range(8)]
    else:
        lanes = (0, 1, 8, 9, 16, 17, 24, 25)
        places = [32 * block + 2 * i + j for block in range(out // 32) for i in range(4) for j in lanes]
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return {"B": signed.int(), "s": scales[:, places].contiguous()}


@pytest.mark.parametrize("group_size", [-1, 32, 96])
def test_marlins_order_is_undone(group_size: int) -> None:
    matrix = writers.rounded(weight_of(128, 96), 4, group_size, sym=True)
    matrix.codes[:16, :16] = torch.arange(256).view(16, 16) % 16
    found = read(MARLIN | {"group_size": group_size}, marlin(matrix), 128, 96)
    assert torch.equal(dequantise(found, torch.float32).double(), matrix.dense())


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True},
        {"quant_method": "marlin", "group_size": 32},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "format": "marlin"},
    ],
    ids=str,
)
def test_every_name_of_marlins_order_is_known(section: dict[str, Any]) -> None:
    matrix = writers.rounded(weight_of(64, 64), 4, 32, sym=True)
    found = read(section, marlin(matrix), 64, 64)
    assert torch.equal(dequantise(found, torch.float32).double(), matrix.dense())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits is 8; served are 4"),
        ({"desc_act": True}, "desc_act is True"),
        ({"sym": False}, "sym is False"),
        (
            {"checkpoint_format": "marlin_24"},
            "checkpoint_format is 'marlin_24'; served are 'gptq', 'gptq_v2', 'marlin'",
        ),
        ({"dynamic": {"-:x": {}}}, "marlin's packing has one for all"),
    ],
    ids=str,
)
def test_what_marlins_order_cannot_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        scheme_of({"quantization_config": MARLIN | change}, Path("model"))


def test_a_matrix_that_fills_no_tiles_is_refused() -> None:
    with pytest.raises(StartupError, match="m has 96 columns and 40 rows; marlin packs tiles of 16 and 64"):
        read(MARLIN, {"B": torch.zeros(6, 80, dtype=torch.int32)}, 40, 96)


# ---- settings by layer

RULES = GPTQ | {
    "dynamic": {
        r"-:model\.layers\.1\..*k_proj": {},
        r"+:.*down_proj": {"bits": 8, "group_size": -1},
        r"model\.layers\.1\.": {"group_size": 96, "damp_percent": 0.1},
    }
}


def by_rule(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    bits, group_size = 4, 32
    if name == "model.layers.1.self_attn.k_proj":
        return {"weight": weight}, weight
    if "down_proj" in name:
        bits, group_size = 8, -1
    elif name.startswith("model.layers.1."):
        group_size = 96
    matrix = writers.rounded(weight, bits, group_size, sym=False)
    return writers.gptq(matrix, bits), matrix.dense().float()


def test_layers_with_settings_of_their_own_are_read_with_them(tmp_path: Path) -> None:
    quantised, dense = write_both(tmp_path, RULES, by_rule)
    assert torch.equal(load(quantised).step({"a": TOKENS})["a"], load(dense).step({"a": TOKENS})["a"])
    scheme = scheme_of({"quantization_config": RULES}, quantised)
    assert scheme is not None and scheme.title == "gptq 4 bit g32, 4 bit g96, 8 bit"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["x"], r"dynamic is \['x'\]; an object of patterns"),
        ({"(": {}}, r"dynamic has '\(', which is no pattern"),
        ({"x": {"bits": 5}}, r"dynamic: x: bits is 5; served are 2, 3, 4, 8"),
        ({"x": {"adapter": {"rank": 8}}}, r"dynamic has an unknown 'adapter' for 'x'; served are bits"),
        ({"x": 4}, r"dynamic has 4 for 'x'"),
    ],
    ids=str,
)
def test_a_rule_that_means_nothing_is_refused(rules: object, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        scheme_of({"quantization_config": GPTQ | {"dynamic": rules}}, Path("model"))


def test_a_quantised_matrix_that_a_rule_calls_dense_is_refused() -> None:
    scheme = scheme_of({"quantization_config": RULES}, Path("model"))
    name = "model.layers.1.self_attn.k_proj"
    with pytest.raises(StartupError, match=rf"{name}.qweight, but its config's `dynamic` says"):
        assert scheme is not None and scheme.covers(Held({f"{name}.qweight": torch.zeros(1)}), name)


# ---- the head


def test_a_quantised_head_answers_what_its_dense_copy_does(tmp_path: Path) -> None:
    quantised, dense = tmp_path / "quantised", tmp_path / "dense"
    for folder in (quantised, dense):
        write_model(folder, vocab_size=104)  # whole words of 32 bits
    stored = load_file(quantised / "model.safetensors")
    matrix = writers.rounded(stored.pop("lm_head.weight"), 4, 32, sym=False)
    head = {f"lm_head.{leaf}": part for leaf, part in writers.gptq(matrix, 4).items()}
    save_file(stored | head, quantised / "model.safetensors")
    save_file(stored | {"lm_head.weight": matrix.dense().float()}, dense / "model.safetensors")
    config = json.loads((quantised / "config.json").read_text())
    section = {**GPTQ, "lm_head": True}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    served = load(quantised)
    heads = [
        layer for layer in served.model.modules() if isinstance(layer, Linear) and layer.names == ("lm_head",)
    ]
    assert [type(head.product) for head in heads] == [Quantised]
    assert torch.equal(served.step({"a": TOKENS})["a"], load(dense).step({"a": TOKENS})["a"])
