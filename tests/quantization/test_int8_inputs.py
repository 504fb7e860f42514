"""Checkpoints of int8 whose format rounds inputs to int8 as well answer what that arithmetic does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.quantization.held import read
from tests.quantization.test_eight_bit import INT8, W8A8, int8, int_quantised, scales_of
from tests.quantization.test_served import TOKENS, Made, load, write_both
from tgi_server.layers.linear import Linear


def int8_static(name: str, weight: Tensor) -> Made:
    tensors, dense = int8(name, weight)
    return tensors | {"input_scale": torch.tensor([0.02]).bfloat16()}, dense


ROUNDED: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Made]]] = {
    "int8 by int8": (W8A8, int8),
    "int8 by int8, stored scales": (int_quantised(INT8 | {"strategy": "tensor"}), int8_static),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_int8_by_int8_answers_what_compressed_tensors_own_arithmetic_does(tmp_path: Path, case: str) -> None:
    section, make = ROUNDED[case]
    quantised, dense = write_both(tmp_path, section, make)
    served = load(quantised)
    kinds = {layer.product.kind for layer in served.model.modules() if isinstance(layer, Linear)}
    scales = "a stored scale" if "stored" in case else "scales by token"
    assert f"compressed-tensors 8 bit · activations rounded to int8, {scales}" in kinds
    got, unrounded = served.step({"a": TOKENS})["a"], load(dense).step({"a": TOKENS})["a"]
    want = own_arithmetic(dense, section, 0.02 if "stored" in case else None)
    # A number between two codes may go to either, as float32 has it, and is met by all later tokens.
    apart, off = (got - want).abs(), (unrounded - want).abs()
    assert apart[0].max() < 1e-4
    assert off[0].max() > 1e-3
    assert apart.mean() < 0.5 * off.mean()


def own_arithmetic(dense: Path, section: dict[str, Any], scale: float | None) -> Tensor:
    """Logits [tokens, vocab] of transformers' model whose inputs compressed-tensors rounds, and widens again."""
    package = pytest.importorskip("compressed_tensors").quantization
    args = package.QuantizationArgs(**section["config_groups"]["group_0"]["input_activations"])
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)

    def rounded(_layer: Any, given: tuple[Tensor]) -> Tensor:
        x = given[0]
        if scale is None:
            found = package.utils.compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
        else:
            found = torch.tensor([scale]).bfloat16().float(), torch.zeros(1)
        widened: Tensor = package.lifecycle.forward.fake_quantize(x, *found, args)
        return widened

    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            layer.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


@pytest.mark.parametrize(
    ("inputs", "found", "scale"),
    [
        (None, "exact", None),
        ({"strategy": "token", "dynamic": True}, "rows", None),
        ({"strategy": "tensor", "dynamic": True}, "rows", None),
        ({"strategy": "tensor"}, "rows", 0.5),
        ({"strategy": "token", "dynamic": True, "symmetric": False}, "other", None),
        ({"strategy": "group", "group_size": 32, "dynamic": True}, "other", None),
    ],
)
def test_how_inputs_of_int8_are_rounded_is_what_the_config_says(
    inputs: dict[str, Any] | None, found: str, scale: float | None
) -> None:
    tensors = {
        "weight": torch.ones(200, 320, dtype=torch.int8),
        "weight_scale": scales_of(200, 1),
        "input_scale": torch.tensor(0.5),
    }
    weight = read(int_quantised(None if inputs is None else INT8 | inputs), tensors, 200, 320)
    assert weight.inputs == found
    assert (None if weight.input_scale is None else weight.input_scale.tolist()) == (scale and [scale])
