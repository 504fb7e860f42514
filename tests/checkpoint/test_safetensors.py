"""Tensors come out of a folder as they went in; a folder that is not whole says what is wrong with it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tgi_server.checkpoint.headers import INDEX_FILE
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.errors import StartupError

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3).bfloat16(),
    "model.norm.weight": torch.tensor([1.0, -2.5, 3.0]),
    "lm_head.weight": torch.ones(4, 3, dtype=torch.float16),
}


@pytest.fixture(params=["one file", "two files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        write_shards(tmp_path, TENSORS)
    return tmp_path


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One shard per tensor, and an index."""
    files = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    write_index(folder, files)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_tensors_come_out_as_they_went_in(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = checkpoint.tensor(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_rows_are_a_slice_of_the_first_axis(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    name = "model.embed_tokens.weight"
    for start, stop in [(0, 4), (1, 3), (2, 2), (3, 4)]:
        assert torch.equal(checkpoint.rows(name, start, stop), TENSORS[name][start:stop])
    for start, stop in [(-1, 2), (3, 2), (0, 5)]:
        with pytest.raises(StartupError, match=rf"rows {start} to {stop} of {name}.*\(4, 3\)"):
            checkpoint.rows(name, start, stop)


def test_a_missing_tensor_is_named_with_its_folder_and_its_neighbours(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for read in (checkpoint.tensor, checkpoint.shape):
        with pytest.raises(
            StartupError, match=r"no tensor model\.norm\.bias .*similar: model\.norm\.weight"
        ) as caught:
            read("model.norm.bias")
        assert str(folder) in str(caught.value)


def test_a_file_cut_short_is_refused_when_it_is_opened(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    data = path.read_bytes()
    for length in (0, 4, 8, 40, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(StartupError, match=f"{path.name} cannot be read"):
            Checkpoint(folder)


ENTRY = '{"t":{"dtype":"F32","shape":[%s],"data_offsets":[%d,%d]}}'
CORRUPT = {
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "not JSON": raw_file(b"{nonsense"),
    "not an object": raw_file(b"[1, 2]"),
    "not UTF-8": raw_file(b'{"\xff\xfe": 1}'),
    "data past the end": raw_file((ENTRY % ("4", 0, 16)).encode(), bytes(8)),
    "data left over": raw_file((ENTRY % ("1", 0, 4)).encode(), bytes(64)),
    "shape larger than its data": raw_file((ENTRY % ("1024", 0, 16)).encode(), bytes(16)),
    "product that overflows": raw_file((ENTRY % ("4294967296,4294967296", 0, 0)).encode()),
    "offsets backwards": raw_file((ENTRY % ("1", 8, 4)).encode(), bytes(16)),
    "hole before the data": raw_file((ENTRY % ("1", 4, 8)).encode(), bytes(8)),
    "unknown type": raw_file(b'{"t":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_lying_header_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(CORRUPT[case])
    with pytest.raises(StartupError, match=r"model\.safetensors cannot be read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/../../b.safetensors",
        "sub/x.safetensors",
        "x.bin",
        "",
        7,
        None,
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: object) -> None:
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", {"model.norm.weight": file})
    with pytest.raises(StartupError, match="the bare name of a"):
        Checkpoint(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(StartupError, match=INDEX_FILE.replace(".", r"\.")):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(StartupError, match=r"lacks 1 of 3 shards, model-00001-of-00003\.safetensors"):
        Checkpoint(tmp_path)


def test_a_shard_without_its_promised_tensor_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS)
    save_file({"other": torch.ones(1)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(
        StartupError, match=r"00001-of-00003\.safetensors lacks 1 tensors.*model\.norm\.weight"
    ):
        Checkpoint(tmp_path)


def test_links_as_the_hubs_cache_makes_them_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "3f5a")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/3f5a")
    assert Checkpoint(tmp_path / "snapshot").names() == TENSORS.keys()


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model.Q4_1.gguf", r"give the file itself: .*model\.Q4_1\.gguf"),
        ("notes.txt", "neither model.safetensors nor"),
    ],
)
def test_a_folder_of_another_format_says_what_to_do(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).write_bytes(b"\x80\x04canary")
    with pytest.raises(StartupError, match=advice) as caught:
        Checkpoint(tmp_path)
    assert file in str(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="nowhere is no folder"):
        Checkpoint(tmp_path / "nowhere")
