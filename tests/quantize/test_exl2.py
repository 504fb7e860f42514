"""`tgi-server quantize --method exl2` writes as many bits as are asked for, and the server answers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.quantization.test_served import load
from tests.quantize.test_command import model, quantize
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Quantised, SideBySide
from tgi_server.layers.segmented import Segmented
from tgi_server.quantize import methods

__all__ = ["model"]  # a fixture

EXL2 = ["--method", "exl2", "--samples", "4"]
WEIGHTS = 2 * (96 * (96 + 32 + 32 + 96) + 3 * 96 * 128)  # of the blocks of the tiny model


def stored_bits(folder: Path) -> float:
    """All that is stored for the matrices of the blocks, for each of their weights."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        total += sum(8 * tensor.nbytes for name, tensor in load_file(shard).items() if ".q_" in name)
    return total / WEIGHTS


@pytest.mark.parametrize("bits", ["3.75", "7.25"])
def test_what_is_written_has_the_bits_that_are_asked_for_and_is_served(
    model: Path, tmp_path: Path, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(model, out, *EXL2, "--bits", bits) == 0
    assert "verdict: " in capsys.readouterr().out
    assert float(bits) - 0.15 < stored_bits(out) <= float(bits)
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section == {"quant_method": "exl2", "bits": float(bits), "head_bits": 16}
    served = load(out)
    kinds = {type(layer.product) for layer in served.model.modules() if isinstance(layer, Linear)}
    assert kinds & {Segmented, Quantised, SideBySide}
    tokens = list(range(1, 41))
    logits = served.step({"a": tokens})["a"]
    one_by_one = load(out)
    assert torch.equal(torch.cat([one_by_one.step({"a": [token]})["a"] for token in tokens]), logits)
    apart = (logits - load(model).step({"a": tokens})["a"]).norm() / logits.norm()
    assert float(apart) < {"3.75": 1.0, "7.25": 0.15}[bits], (
        "logits that have nothing in common are 1.4 apart"
    )


def test_a_run_that_was_stopped_keeps_what_it_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert quantize(model, whole, *EXL2) == 0
    solved, calls = methods.exl2.solve, []

    def fails(*arguments: Any) -> object:
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return solved(*arguments)

    monkeypatch.setattr(methods.exl2, "solve", fails)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, stopped, *EXL2)
    assert (stopped / ".quantize" / "plan.safetensors").exists()
    monkeypatch.setattr(methods.exl2, "solve", solved)
    monkeypatch.setattr(methods.exl2, "offer_of", fails)  # nothing is measured again
    assert quantize(model, stopped, *EXL2) == 0
    for shard in sorted(whole.glob("*.safetensors")):
        found, want = load_file(stopped / shard.name), load_file(shard)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("bits", "message"),
    [("2", "--bits is 2; exl2 has more than 2, up to 8"), ("2.2", "give 2.5")],
)
def test_fewer_bits_than_the_format_has_are_refused(
    model: Path, tmp_path: Path, bits: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / "out", *EXL2, "--bits", bits) == 2
    assert message in capsys.readouterr().err
