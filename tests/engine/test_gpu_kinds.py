"""Quantised checkpoints on a GPU: as near to their dequantised model in fp32 as that model is in bf16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.engine.gpu_rig import answers, engine, prompts
from tests.quantization import writers
from tests.quantization.exl2_writer import random_matrix
from tgi_kernels.quant_weight import dequantise
from tgi_server.quantization.on_load import ON_LOAD

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

Made = tuple[dict[str, Tensor], Tensor]  # as the format stores it; what it stands for
EXL2 = [(6, 32)] * 4 + [(4, 32)] * 10 + [(3, 32)] * 2  # bits and columns of each group, of 512 columns


def gptq_3_bits(_name: str, weight: Tensor) -> Made:
    matrix = writers.rounded(weight, 3, 64, sym=True)
    return writers.gptq(matrix, 3), matrix.dense().float()


def exl2(_name: str, weight: Tensor) -> Made:
    mix = EXL2 * (weight.shape[1] // 512)
    # What has the same inputs has the same order.
    matrix = random_matrix(mix, len(weight), seed=len(mix), size=0.3)
    return matrix.tensors(), matrix.dense().float()


STORED: dict[str, tuple[dict[str, object], Callable[[str, Tensor], Made]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": True, "desc_act": False},
        gptq_3_bits,
    ),
    "exl2": ({"quant_method": "exl2", "bits": 4.25}, exl2),
}


def dequantised_on_load(folder: Path, name: str) -> dict[str, Tensor]:
    """What `--quantize name` makes of the blocks' matrices, widened."""
    tensors = load_file(folder / "model.safetensors")
    return {
        key: dequantise(ON_LOAD[name].quantise(tensor.float()), torch.float32)
        if key.endswith("_proj.weight")
        else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("case", [*STORED, "bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_logprobs_are_as_near_as_those_of_transformers_in_bf16(
    llama: Path, tmp_path: Path, case: str
) -> None:
    dense, served = tmp_path / "dense", tmp_path / "served"
    shutil.copytree(llama, dense)
    shutil.copytree(llama, served)
    if case in STORED:
        tensors = writers.quantise_folder(served, *STORED[case])
        rig = engine(served)
    else:
        tensors = dequantised_on_load(llama, case)
        rig = engine(served, quantize=case)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    models = [
        LlamaForCausalLM.from_pretrained(dense, dtype=dtype).cuda()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    ours, theirs = [], []
    for prompt, answer in zip(prompts(12), answers(rig, prompts(12)), strict=True):
        ids = [token for token, _ in answer]
        inputs = torch.tensor([prompt + ids[:-1]], device="cuda")
        with torch.inference_mode():
            exact, rounded = (
                model(inputs).logits[0, len(prompt) - 1 :].float().log_softmax(-1)[range(len(ids)), ids]
                for model in models
            )
        ours.append(torch.tensor([logprob for _, logprob in answer], device="cuda") - exact)
        theirs.append(rounded - exact)
    assert torch.cat(ours).square().mean() <= 2 * torch.cat(theirs).square().mean()
    assert any("fused up to" in kind for kind in rig.runner.matrices.values()), rig.runner.matrices
