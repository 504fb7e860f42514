"""Checkpoints that are damaged, incomplete or lie. Numbers are rows of `docs/faults.md`.

What front end and engine read is the same code: most cases need no process.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.tiny_model import HIDDEN, VOCAB, tensors, write_model
from tests.server import running_server
from tgi_server import cli
from tgi_server.checkpoint.headers import INDEX_FILE, check_files, check_layers
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.checkpoint.verify import verify
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.models import load_model
from tgi_server.text.text import Text, doubts

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """What `tgi-server serve` says of a model it does not start with; one line."""
    assert cli.main(["serve", str(folder), "--device", "cpu", "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


# ---- row 100: something is missing


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_row_100_a_file_that_is_missing_is_named(
    model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (model / name).unlink()
    assert name in refusal(capsys, model)


def test_row_100_an_index_that_lists_an_absent_shard(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(tensors(), "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    assert "lacks 1 of 2 shards, model-00002-of-00002.safetensors among them" in refusal(capsys, model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS, INDEX_FILE])
def test_row_100_a_folder_in_a_files_place_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == INDEX_FILE:
        (model / WEIGHTS).unlink()
    (model / name).unlink(missing_ok=True)
    (model / name).mkdir()
    assert name in refusal(capsys, model)


# ---- rows 101 and 102: safetensors that are not


def boundaries(data: bytes) -> dict[str, int]:
    length = int.from_bytes(data[:8], "little")
    return {
        "nothing": 0,
        "most of the length": 7,
        "the length alone": 8,
        "the header's first byte": 9,
        "all but the header's last byte": 8 + length - 1,
        "the header alone": 8 + length,
        "one byte of data": 8 + length + 1,
        "half of it": len(data) // 2,
        "all but the last byte": len(data) - 1,
    }


@pytest.mark.parametrize("case", list(boundaries(bytes(100))))
def test_row_101_a_file_cut_short_is_named_with_the_place(
    model: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    path = model / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: boundaries(data)[case]])
    error = refusal(capsys, model)
    assert str(path) in error
    assert "offset" in error or "bytes, not even the 8" in error
    with pytest.raises(StartupError, match="cannot be read"):
        Checkpoint(model)


def test_row_101_bytes_left_over_are_refused(model: Path) -> None:
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(StartupError, match=r"last tensor ends at offset \d+, the file at \d+"):
        check_files(model)


def written(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: object = "F32", shape: object = (1,), begin: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE = {
    "a header of 2^63 bytes": (struct.pack("<Q", 1 << 63), "offset 0: a header of 9223372036854775808"),
    "a header of over 100 MB": (struct.pack("<Q", 100_000_001), "more than 100000000"),
    "a header past the end": (
        struct.pack("<Q", 50) + b"{}",
        "a header of 50 bytes in a file that ends at 10",
    ),
    "no header": (struct.pack("<Q", 0), "offset 8: its header is no JSON"),
    "no UTF-8": (written(b'{"a\xff": 1}'), "offset 11: its header is no UTF-8"),
    "no JSON": (written(b'{"a": nonsense}'), "offset 14: its header is no JSON"),
    "no object": (written([1]), "no JSON object"),
    "nested too deep": (written(b"[" * 200_000), "its header is no"),
    "two that overlap": (
        written({"a": one(), "b": one(begin=2, end=6)}, bytes(6)),
        "overlaps the one before",
    ),
    "the same bytes twice": (written({"a": one(), "b": one()}, bytes(4)), "overlaps the one before"),
    "a hole": (written({"a": one(), "b": one(begin=8, end=12)}, bytes(12)), "leaves a hole"),
    "a hole in front": (written({"a": one(begin=4, end=8)}, bytes(8)), "leaves a hole"),
    "a name twice": (written(f'{{"a":{ONE},"a":{ONE}}}'.encode(), bytes(4)), "names 'a' twice"),
    "a shape twice": (written(b'{"a":{"dtype":"F32","shape":[1],"shape":[2]}}'), "names 'shape' twice"),
    "an unknown type": (written({"a": one("Q4_K")}, bytes(4)), "'a' has type 'Q4_K', which is unknown"),
    "a type that is none": (written({"a": one(dtype=7)}, bytes(4)), "type '7'"),
    "negative offsets": (written({"a": one(begin=-4, end=0)}), "offsets"),
    "offsets backwards": (written({"a": one(begin=4, end=0)}, bytes(4)), "offsets"),
    "fractions": (written({"a": one(shape=[1.0])}, bytes(4)), "shape"),
    "a negative shape": (written({"a": one(shape=[-1])}, bytes(4)), "shape"),
    "a shape that overflows": (written({"a": one(shape=[1 << 62, 8], end=0)}), "147573952589676412928 bytes"),
    "a shape of 2^64": (written({"a": one(shape=[1 << 64])}, bytes(4)), "shape"),
    "a thousand axes": (written({"a": one(shape=[1] * 1000)}, bytes(4)), "shape"),
    "too large for its bytes": (written({"a": one(shape=[1024])}, bytes(4)), "4096 bytes, but lies at 0 … 4"),
    "data past the end": (written({"a": one()}, bytes(3)), "the file at"),
    "a tensor that is none": (written({"a": None}), "type 'None'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_row_102_a_hostile_header_is_refused(tmp_path: Path, case: str) -> None:
    data, complaint = HOSTILE[case]
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(StartupError) as caught:
        check_files(tmp_path)
    assert complaint in str(caught.value)
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_row_102_unordered_tensors_without_gaps_are_fine(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(written({"b": one(begin=4, end=8), "a": one()}, bytes(8)))
    assert check_files(tmp_path) == {"a", "b"}


def test_row_103_a_file_cut_short_while_it_is_served_changes_nothing(model: Path) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 20}}
    with running_server("--device", "cpu", model=model) as server:
        before = server.post("/generate", body)
        with (model / WEIGHTS).open("r+b") as file:
            file.truncate(100)
        other = {"inputs": "another prompt, which is in no cache", "parameters": {"max_new_tokens": 20}}
        server.post("/generate", other)
        assert server.post("/generate", body) == before
        assert server.get("/info")["engine"]


# ---- row 104: bits that flipped


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)


def write_sums(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
        for path in folder.glob("*")
        if path.is_file()
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def as_the_hub_caches(folder: Path) -> None:
    """Files become links to blobs named after what they hold."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        if path.suffix != ".safetensors":
            name = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        path.rename(blobs / name)
        path.symlink_to(f"../blobs/{name}")


def as_downloaded_to_a_folder(folder: Path) -> None:
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (notes / f"{WEIGHTS}.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")


@pytest.mark.parametrize("sums", [write_sums, as_the_hub_caches, as_downloaded_to_a_folder])
def test_row_104_flipped_bits_are_found(model: Path, sums: Callable[[Path], None]) -> None:
    sums(model)
    assert verify(model, 2).files >= 1
    flip(model / WEIGHTS)
    with pytest.raises(
        StartupError, match=r"model\.safetensors has checksum [0-9a-f]{64}, [0-9a-f]{64} is exp"
    ):
        verify(model, 2)


def test_row_104_small_files_of_the_hub_are_compared_as_git_does(model: Path) -> None:
    as_the_hub_caches(model)
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(StartupError, match=r"tokenizer_config\.json has checksum [0-9a-f]{40},"):
        verify(model, 2)


def test_row_104_the_option_stops_the_start(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nobody knows the checksum of model.safetensors" in refusal(capsys, model, "--verify")
    write_sums(model)
    flip(model / WEIGHTS)
    assert "model.safetensors has checksum" in refusal(capsys, model, "--verify")


def test_row_104_with_the_right_sums_it_starts(model: Path) -> None:
    write_sums(model)
    with running_server("--device", "cpu", "--verify", model=model) as server:
        assert "4 files" in server.log and "are what their checksums say" in server.log


# ---- rows 107 and 108: parts that do not belong together


def test_row_107_a_tokenizer_larger_than_the_embedding_is_doubted_and_never_looked_up(tmp_path: Path) -> None:
    weights = tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:258].clone()
    folder = write_model(tmp_path, weights, vocab_size=258)
    assert any(
        "tokens, the model 258: prompts with tokens from 258 on" in line for line in doubts(text(folder))
    )
    with running_server("--device", "cpu", model=folder) as server:
        assert "the two may belong to different models" in server.log
        with pytest.raises(Exception, match="422"):
            server.post("/generate", {"inputs": "<|user|>", "parameters": {"max_new_tokens": 2}})
        assert server.post("/generate", {"inputs": "z", "parameters": {"max_new_tokens": 2}})


def text(folder: Path) -> Text:
    return Text.from_folder(folder)


def test_row_107_a_tokenizer_smaller_than_the_embedding_is_usual(model: Path) -> None:
    assert text(model).tokenizer.vocab_size < VOCAB
    assert doubts(text(model)) == []


def test_row_107_a_model_that_never_ends_is_doubted(tmp_path: Path) -> None:
    (line,) = doubts(text(write_model(tmp_path, eos_token_id=None)))
    assert "names an eos_token_id" in line


def test_row_107_a_tokenizer_of_the_old_kind_alone_says_how_to_convert_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "tokenizer.json").rename(model / "vocab.json")
    assert "convert the checkpoint's tokenizer to a tokenizer.json" in refusal(capsys, model)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_attention_heads": 3}, "hidden_size 64 is no multiple of num_attention_heads 3"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        ({"eos_token_id": 300}, "eos_token_id is 300, but config.json's vocab_size is 300"),
        ({"eos_token_id": [257, 999]}, "but config.json's vocab_size is 300"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_row_108_a_config_that_contradicts_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], complaint: str
) -> None:
    assert complaint in refusal(capsys, write_model(tmp_path, **changes))


def test_row_108_layers_that_the_config_does_not_count_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path, tensors(layers=3), num_hidden_layers=2)
    assert "num_hidden_layers is 2, but the checkpoint has model.layers.2" in refusal(capsys, folder)
    check_layers(tensors(layers=3), 3)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 2}, r"no tensor model\.layers\.1\."),
        ({"head_dim": 32}, r"shape \(64, 64\); config\.json asks for \(32, 64\)"),
        ({"vocab_size": VOCAB + 1}, rf"embed_tokens\.weight has shape \({VOCAB}, {HIDDEN}\)"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type is 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor is None"),
    ],
)
def test_row_108_a_config_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    folder = write_model(tmp_path, **changes)
    with pytest.raises(StartupError, match=complaint):
        load_model(Checkpoint(folder), ModelConfig.from_folder(folder), torch.device("cpu"), torch.float32)


def test_row_108_what_the_engine_refuses_ends_the_service_with_its_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = tensors()
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].clone()
    folder = write_model(tmp_path, weights)
    save_file(weights, folder / WEIGHTS)
    assert cli.main(["serve", str(folder), "--device", "cpu", "--port", "0"]) == 1
    assert "lm_head.weight has shape (300, 63); config.json asks for (300, 64)" in capfd.readouterr().err
