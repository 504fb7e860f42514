"""gptqmodel, which transformers asks to load GPTQ and AWQ, has the weights and logits of what `quantize` writes.

The package wants torch releases of its own, so that it is no dependency of the tests; they run where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantization.test_served import TOKENS, load
from tests.quantize.test_command import make_model, quantize
from tgi_kernels.quant_weight import QuantWeight, dequantise
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.quantization.detect import find_scheme

METHODS = {
    "gptq": [],
    "gptq, zero points": ["--asymmetric"],
    "gptq, ordered columns": ["--desc-act"],
    "gptq, 3 bits": ["--bits", "3"],
    "gptq, 8 bits": ["--bits", "8"],
    "awq": ["--method", "awq", "--group-size", "32", "--samples", "4"],
}


def loaded_by_gptqmodel(folder: Path, *, awq: bool) -> Any:
    """In float16, with its kernels that are plain torch; others want to be compiled first, or round more."""
    gptqmodel = pytest.importorskip("gptqmodel")
    backend = gptqmodel.BACKEND.AWQ_TORCH if awq else gptqmodel.BACKEND.GPTQ_TORCH
    return gptqmodel.GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16)


@pytest.mark.parametrize("method", METHODS)
def test_gptqmodel_has_the_same_weights_and_logits(tmp_path: Path, method: str) -> None:
    model, out = make_model(tmp_path / "model", hidden_size=128, num_attention_heads=8), tmp_path / "out"
    assert quantize(model, out, *METHODS[method]) == 0
    theirs = loaded_by_gptqmodel(out, awq=method == "awq")
    checkpoint = Checkpoint(out)
    scheme = find_scheme(ModelConfig.from_folder(out).raw, checkpoint)
    assert scheme is not None
    compared = 0
    for name, module in theirs.model.named_modules():
        if scheme.covers(checkpoint, name):
            own = scheme.read(checkpoint, name, module.out_features, module.in_features)
            assert isinstance(own, QuantWeight)
            # Its own identity is what it multiplies by: no other function is in all of its layers.
            held = module(torch.eye(module.in_features, dtype=torch.float16)).T
            assert torch.equal(held, dequantise(own, torch.float16)), name
            compared += 1
    assert compared == 14
    want = load(out).step({"a": TOKENS})["a"]
    with torch.inference_mode():
        found = theirs.model(torch.tensor([TOKENS])).logits[0].float()
    assert float((found - want).norm()) < 4e-3 * float(want.norm())
