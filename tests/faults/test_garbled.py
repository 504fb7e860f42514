"""Weights that are numbers but say nothing. Numbers are rows of `docs/faults.md`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantization import writers
from tests.server import DEMO, computes_on_gpu, running_server

SECTION = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
OPTIONS = ("--quality-check", "--max-total-tokens", "512")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    shutil.copytree(DEMO, folder)

    def make(_name: str, weight: torch.Tensor) -> object:
        return writers.awq(writers.rounded(weight, 4, 64, sym=False)), weight

    writers.quantise_folder(folder, dict(SECTION), make)
    return folder


def test_row_106_a_quantised_checkpoint_that_is_whole_passes_the_quality_check(quantised: Path) -> None:
    with running_server(*OPTIONS, model=quantised) as server:
        assert "quality check: perplexity " in server.log
        engine = server.get("/info")["engine"]
    assert isinstance(engine, dict)
    kernel = "awq 4 bit g64 · fused" + (" up to 1024 tokens" if computes_on_gpu() else "")
    assert engine["matrices"] == {
        "model.layers.*.self_attn.q_proj, k_proj, v_proj": kernel,
        "model.layers.*.self_attn.o_proj": kernel,
        "model.layers.*.mlp.gate_proj, up_proj": kernel,
        "model.layers.*.mlp.down_proj": kernel,
        "model.embed_tokens": "bfloat16 · dense",
    }


def test_row_106_a_checkpoint_with_shuffled_scales_is_not_served(quantised: Path, tmp_path: Path) -> None:
    shutil.copytree(quantised, folder := tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        if name.endswith(".scales"):
            flat = tensors[name].flatten()
            tensors[name] = flat[torch.randperm(len(flat), generator=generator)].view_as(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    command = [sys.executable, "-m", "tgi_server.cli", "serve", str(folder), "--port", "0", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "is ready" not in done.stdout
    assert "the model is garbled. Its perplexity on a page of plain English is " in done.stderr
