"""`tgi-server quantize` writes what the server, and other readers of the format, load; `eval` says how good it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.quantization.test_served import load, write_model
from tgi_server import cli
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Quantised

WORDS = [f"w{i}" for i in range(100)]
ARGUMENTS = ["--group-size", "32", "--samples", "4", "--length", "32"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_model(folder)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text").write_text(" ".join(WORDS[i * i % 97] for i in range(2000)))
    return folder


def quantize(model: Path, out: Path, *more: str) -> int:
    return cli.main(
        ["quantize", str(model), str(out), "--calibration", str(model / "text"), *ARGUMENTS, *more]
    )


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "nearest"],
        ["--desc-act"],
        ["--asymmetric", "--bits", "3"],
        ["--bits", "8", "--memory", "0"],
    ],
    ids=" ".join,
)
def test_what_is_written_is_served(
    model: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(model, out, *more) == 0
    assert "verdict: " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    }
    assert not (out / ".quantize").exists()
    served = load(out)
    kinds = [type(layer.product) for layer in served.model.modules() if isinstance(layer, Linear)]
    assert kinds.count(Quantised) == len(kinds) - 1, "all but the head"
    tokens = list(range(1, 41))
    assert bool(served.step({"a": tokens})["a"].isfinite().all())
    untouched, dense = Checkpoint(out), load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(untouched.tensor(name), dense[name])


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert quantize(model, whole, "--memory", "0") == 0
    from tgi_server.quantize import command

    solved = command.gptq
    calls = []

    def fails(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return solved(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "gptq", fails)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, stopped, "--memory", "0")
    assert (stopped / ".quantize" / "model.layers.0.safetensors").exists()
    assert quantize(model, stopped, "--memory", "0", "--bits", "8") == 2, "other settings"
    monkeypatch.setattr(command, "gptq", solved)
    assert quantize(model, stopped, "--memory", "0") == 0
    for shard in sorted(whole.glob("*.safetensors")):
        found, want = load_file(stopped / shard.name), load_file(shard)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_folder_in_use_and_a_size_that_does_not_divide_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, model) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert quantize(model, tmp_path / "out", "--group-size", "80") == 2
    assert "q_proj: group_size 80 does not divide the matrix's 96 columns" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_eval_compares_with_a_base(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", str(model / "text"), "--samples", "2", "--length", "32"]
    assert cli.main(["eval", str(model), *arguments]) == 0
    alone = capsys.readouterr().out
    assert "no base to compare with" in alone
    assert cli.main(["eval", str(model), "--against", str(model), *arguments]) == 0
    same = capsys.readouterr().out
    assert "same likeliest token" in same and "100.0%" in same and "verdict: good" in same
    assert quantize(model, tmp_path / "out", "--bits", "2", "--method", "nearest") == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "out"), "--against", str(model), *arguments]) == 0
    assert "verdict: poor" in capsys.readouterr().out


def test_a_quantised_model_is_not_quantised_again(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    assert quantize(model, model.parent / "out") == 2
    assert "is quantised already" in capsys.readouterr().err
