"""A quantised checkpoint on a GPU says what it says on a CPU, whichever tool of ours wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.in_process import InProcess
from tests.engine.agreement import Opinion, Said, opinion, say
from tests.engine.gpu_rig import engine, engine_on_cpu
from tests.quantize.test_command import make_model, quantize
from tgi_kernels.reference.fp8 import quantise_e4m3, widen_rows
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Product

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
GROUP = ["--group-size", "64"]
PIECES = ["--samples", "4"]
WRITTEN = [
    ["--method", "gptq", *GROUP, *PIECES],
    ["--method", "gptq", "--asymmetric", *GROUP, *PIECES],
    ["--method", "gptq", "--desc-act", *GROUP, *PIECES],
    ["--method", "gptq", "--bits", "8", *GROUP, *PIECES],
    ["--method", "gptq", "--bits", "3", "--asymmetric", *GROUP, *PIECES],
    ["--method", "gptq", "--bits", "2", "--asymmetric", *GROUP, *PIECES],
    ["--method", "nearest", "--group-size", "128"],
    ["--method", "awq", *GROUP, *PIECES],
    ["--method", "nf4", *PIECES],
    ["--method", "int8"],
    ["--method", "fp8"],
    ["--method", "w8a16"],
    ["--method", "w8a16", *GROUP],
    ["--method", "exl2", "--bits", "4.5", *PIECES],
]
ON_LOAD = ["bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8", "eetq"]
PROMPTS = [
    [(7 * i + j * j) % 101 for j in range(length)] for i, length in enumerate((1, 9, 17, 40, 130, 300))
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "model", **SHAPE)


@pytest.fixture(scope="module")
def said(dense: Path) -> list[Said]:
    return say(engine_on_cpu(dense), PROMPTS, 40)


@pytest.fixture(scope="module")
def rounding(dense: Path, said: list[Said]) -> float:
    """Mean error of a logprob by 16-bit weights and activations alone."""
    found = opinion(engine(dense), said).errors.abs().mean().item()
    assert 0 < found < 0.1
    return found


class RoundedInputs:
    """A product on the CPU that gets what Hopper's products of fp8 weights get: rows of x rounded to e4m3."""

    def __init__(self, product: Product) -> None:
        self.kind, self.product = product.kind, product

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Any) -> Tensor:
        return self.product(widen_rows(*quantise_e4m3(x)).float(), bias, **ending)


def rounding_inputs(rig: InProcess) -> InProcess:
    """An engine on a CPU, its products of fp8 weights with rounded inputs from now on."""
    for module in rig.runner._model.modules():
        if isinstance(module, Linear) and "fp8" in module.product.kind:
            module.product = RoundedInputs(module.product)
    return rig


def agrees(folder: Path, rounding: float, **settings: Any) -> tuple[Opinion, InProcess]:
    rig = engine(folder, **settings)
    said, limit = say(engine_on_cpu(folder, **settings), PROMPTS, 40), 2 * rounding
    if any("rounded to e4m3" in way for way in rig.runner.matrices.values()):
        # 16-bit inputs are rounded to other codes here and there: nearer than those that are not rounded at all.
        plain, said = said, say(rounding_inputs(engine_on_cpu(folder, **settings)), PROMPTS, 40)
        limit = opinion(rounding_inputs(engine_on_cpu(folder, **settings)), plain).errors.abs().mean().item()
    found = opinion(rig, said)
    print(
        f"{settings or folder.name}: {rig.runner.matrices}\nmean error {found.errors.abs().mean():.4f}, limit "
        f"{limit:.4f}; likeliest is another at {found.others}, answers part at {found.parted}"
    )
    assert found.errors.abs().mean() <= limit
    widest = found.errors.abs().max().item()
    assert all(gap <= 2 * widest for *_, gap in found.others + found.parted)
    return found, rig


def differs_from_dense(folder: Path, said: list[Said], **settings: Any) -> float:
    """What fewer bits change, on the CPU: an error that is to be seen must be greater than that of rounding."""
    return opinion(engine_on_cpu(folder, **settings), said).errors.abs().mean().item()


@pytest.mark.parametrize("how", WRITTEN, ids=" ".join)
def test_what_quantize_writes_gives_the_answers_of_the_cpu(
    dense: Path, said: list[Said], rounding: float, tmp_path: Path, how: list[str]
) -> None:
    folder = tmp_path / "quantised"
    assert quantize(dense, folder, *how) == 0
    agrees(folder, rounding)
    if "8" not in "".join(how):
        assert differs_from_dense(folder, said) > 4 * rounding


@pytest.mark.parametrize("how", ON_LOAD)
def test_what_is_quantised_while_loading_gives_the_answers_of_the_cpu(
    dense: Path, rounding: float, how: str
) -> None:
    agrees(dense, rounding, quantize=how)
