"""Columns in another order are gathered for o alone: norms, and gate and up, write in the order that is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.paged import Paged
from tests.quantization import test_exl2, writers
from tests.quantization.test_served import CASES, TOKENS, load, write_model
from tgi_kernels import quant
from tgi_kernels.columns import gather_columns
from tgi_server.layers import mlp, segmented
from tgi_server.layers.product import Quantised, SideBySide
from tgi_server.layers.segmented import Segmented
from tgi_server.models import decoder

MODELS = {
    "gptq": CASES["gptq, ordered columns"],
    "exl2 of one width": (test_exl2.SECTION, test_exl2.make({"": [4]})),
    "exl2 of several": (test_exl2.SECTION, test_exl2.make({"": [6, 4, 3]})),
    "exl2, gate and up of different widths": (
        test_exl2.SECTION,
        test_exl2.make({"": [4], "up_proj": [5, 3], "down_proj": [5, 4]}),
    ),
}


def order_of(product: object) -> torch.Tensor | None:
    if isinstance(product, Quantised):
        return product.packed.order
    assert isinstance(product, Segmented)
    return product.order


def has_order(product: object) -> bool:
    return order_of(product) is not None


def answers(served: Paged) -> torch.Tensor:
    return served.step({"a": TOKENS})["a"]


@pytest.mark.parametrize("inner", [128, 160])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_answers_have_the_bits_of_gathering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, has_biases: bool, inner: int
) -> None:
    write_model(tmp_path, intermediate_size=inner)
    writers.quantise_folder(tmp_path, *MODELS[model])
    if has_biases:
        noise, file = torch.Generator().manual_seed(5), tmp_path / "model.safetensors"
        biases = {
            f"model.layers.{layer}.mlp.{name}_proj.bias": torch.randn(inner, generator=noise)
            for layer in range(2)
            for name in ("gate", "up")
        }
        save_file(load_file(file) | biases, file)
    folded = load(tmp_path)
    with monkeypatch.context() as patch:
        for module in (mlp, decoder):
            patch.setattr(module, "take_order", lambda _product: None)
        gathered = load(tmp_path)
    for served, gathers in ((folded, False), (gathered, True)):
        for block in served.model.blocks:
            assert has_order(block.mlp.down.product) == gathers
            for norm, product in (
                (block.attention_norm, block.attention.qkv.product),
                (block.mlp_norm, block.mlp.gate_up.product),
            ):
                assert (norm.order is not None) == (not gathers and not isinstance(product, SideBySide))
                if not isinstance(product, SideBySide):
                    assert has_order(product) == gathers
            assert has_order(block.attention.o.product), "attention writes in no other order"
    assert torch.equal(answers(folded), answers(gathered))


@pytest.mark.parametrize("model", ["gptq", "exl2 of several"])
def test_only_inputs_of_o_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    write_model(tmp_path)
    writers.quantise_folder(tmp_path, *MODELS[model])
    served = load(tmp_path)
    gathered: list[int] = []

    def noted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        gathered.append(order.data_ptr())
        return gather_columns(x, order)

    for module in (quant, segmented):
        monkeypatch.setattr(module, "gather_columns", noted)
    answers(served)
    orders = [order_of(block.attention.o.product) for block in served.model.blocks]
    assert gathered == [order.data_ptr() for order in orders if order is not None]
    assert len(gathered) == 2
