"""Columns of down in another order cost nothing: gate and up make its inputs in it, and no bit changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.paged import Paged
from tests.quantization import test_exl2, writers
from tests.quantization.test_served import CASES, TOKENS, load, write_model
from tgi_server.layers import mlp
from tgi_server.layers.product import Quantised
from tgi_server.layers.segmented import Segmented

MODELS = {
    "gptq": CASES["gptq, ordered columns"],
    "exl2 of one width": (test_exl2.SECTION, test_exl2.make({"": [4]})),
    "exl2 of several": (test_exl2.SECTION, test_exl2.make({"": [6, 4, 3]})),
    "exl2, gate and up of different widths": (
        test_exl2.SECTION,
        test_exl2.make({"": [4], "up_proj": [5, 3], "down_proj": [5, 4]}),
    ),
}


def has_order(product: object) -> bool:
    if isinstance(product, Quantised):
        return product.packed.order is not None
    assert isinstance(product, Segmented)
    return product.order is not None


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
        patch.setattr(mlp, "take_order", lambda _product: None)
        gathered = load(tmp_path)
    for served, gathers in ((folded, False), (gathered, True)):
        assert [has_order(block.mlp.down.product) for block in served.model.blocks] == [gathers] * 2
    assert torch.equal(answers(folded), answers(gathered))
