"""`tgi-server quantize` writes what the server, and other readers of the format, load; `eval` says how good it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.quantization.test_served import load, write_model
from tgi_server import cli
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Quantised
from tgi_server.quantize import arguments, methods
from tgi_server.quantize.command import forward_of
from tgi_server.quantize.evaluate import evaluate
from tgi_server.quantize.fold import divided
from tgi_server.quantize.text import windows

WORDS = [f"w{i}" for i in range(100)]
GRID = ["--group-size", "32"]
STATISTICS = ["--samples", "4"]


def write_text(folder: Path) -> None:
    """A vocabulary of words, and text of them to calibrate with."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text").write_text(" ".join(WORDS[i * i % 97] for i in range(2000)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def make_model(folder: Path, **shape: int) -> Path:
    """With a tokenizer, and a text beside it."""
    write_model(folder, **shape)
    write_text(folder)
    return folder


def quantize(model: Path, out: Path, *more: str) -> int:
    """By GPTQ, with few numbers, unless `more` names another method."""
    options = [] if "--method" in more else [*GRID, *STATISTICS]
    text = ["--calibration", str(model / "text"), "--length", "32"]
    return cli.main(["quantize", str(model), str(out), *text, *options, *more])


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "nearest", *GRID],
        ["--desc-act"],
        ["--asymmetric", "--bits", "3"],
        ["--bits", "8"],
    ],
    ids=" ".join,
)
def test_what_is_written_is_served(
    model: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(model, out, *more) == 0
    assert "verdict: " in capsys.readouterr().out
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir()), "others may read it"
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
    assert quantize(model, whole) == 0
    solved = methods.gptq.gptq
    calls = []

    def fails(*arguments: Any) -> object:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return solved(*arguments)

    monkeypatch.setattr(methods.gptq, "gptq", fails)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, stopped)
    assert (stopped / ".quantize" / "model.layers.0.safetensors").exists()
    assert quantize(model, stopped, "--bits", "8") == 2, "other settings"
    monkeypatch.setattr(methods.gptq, "gptq", solved)
    assert quantize(model, stopped) == 0
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
    assert cli.main(["eval", str(model), "--against", str(model), "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agreement"] == 1 and found["tokens"] == 62 and found["verdict"].startswith("good")
    assert found["perplexity"] == found["base_perplexity"] and len(found["layer_errors"]) == 2
    assert quantize(model, tmp_path / "out", "--bits", "2", "--method", "nearest", *GRID) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "out"), "--against", str(model), *arguments]) == 0
    assert "verdict: poor" in capsys.readouterr().out


def test_eval_names_the_layers_that_err_most(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, broken / "model.safetensors")
    pieces = windows(model, model / "text", 2, 32, held_back=True)
    quality = evaluate(forward_of(broken, 32), pieces, forward_of(model, 32))
    assert quality.layer_errors[0] == 0
    assert 0.05 < quality.layer_errors[1] <= 0.5, "half of what the MLP adds, which is not all"
    (line,) = (line for line in quality.lines() if line.startswith("error of layer 1 "))
    assert f"{quality.layer_errors[1]:.1%}" in line
    assert quality.lines().index(line) < [x.startswith("error of layer 0") for x in quality.lines()].index(
        True
    )


def test_a_quantised_model_is_not_quantised_again(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    assert quantize(model, model.parent / "out") == 2
    assert "is quantised already" in capsys.readouterr().err


def test_the_command_line_and_the_methods_know_the_same_names() -> None:
    assert list(arguments.METHODS) == list(methods.MAKERS)
    assert all(kind.takes.keys() <= set(arguments.OPTIONS) for kind in arguments.METHODS.values())


def test_an_option_that_means_nothing_to_the_method_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, tmp_path / "out", "--method", "nearest", "--desc-act") == 2
    assert "--desc-act means nothing to --method nearest, which takes --bits" in capsys.readouterr().err
    assert quantize(model, tmp_path / "out", "--bits", "5") == 2
    assert "--bits is 5; gptq has 2, 3, 4, 8" in capsys.readouterr().err
    assert quantize(model, tmp_path / "out", "--samples", "0") == 2
    assert "--samples is 0; --method gptq needs 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_awq_scales_columns_and_the_norms_before_them_and_loses_less_than_rounding(
    model: Path, tmp_path: Path
) -> None:
    awq, plain = tmp_path / "awq", tmp_path / "plain"
    assert quantize(model, awq, "--method", "awq", *GRID, "--samples", "32") == 0
    assert quantize(model, plain, "--method", "nearest", "--asymmetric", *GRID) == 0
    written, dense = Checkpoint(awq), load_file(model / "model.safetensors")
    norms = [name for name in dense if "layernorm" in name]
    assert norms and all(not torch.equal(written.tensor(name), dense[name]) for name in norms)
    assert torch.equal(written.tensor("model.norm.weight"), dense["model.norm.weight"])
    tokens = [i * i % 97 for i in range(1900, 1950)]  # of the part of the text that is kept back
    want, *found = (load(folder).step({"a": tokens})["a"] for folder in (model, awq, plain))
    assert float((found[0] - want).norm()) < 0.85 * float((found[1] - want).norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_norms_type_rounds_away_is_made_up_for(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    norm = torch.randn(200, generator=generator).to(dtype)
    norm[:2] = torch.tensor([0.0, 1.0])
    asked = torch.rand(200, generator=generator) * 5 + 0.1
    asked[1] = torch.inf
    less, scales = divided(norm, asked)
    assert less.dtype == dtype
    torch.testing.assert_close(less.float() * scales, norm.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(scales[2:], asked[2:], rtol=0.01, atol=0)
    assert scales[0] == scales[1] == 1, "nothing divides what is zero, or makes it so"
