"""Damaged and hostile files of weights: refused in under a second, without a crash, a hang or a huge allocation.

Row 105 of `docs/faults.md`.

Small real files of both formats are changed at random where it hurts: in the numbers and names of their headers, and in
config.json. What a start reads of them is read in its order. Whatever is not refused has to load.
"""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from gguf import GGMLQuantizationType
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.tiny_gguf import random_llama, weights_of, write_gguf
from tests.faults.tiny_model import write_model
from tgi_server import configure
from tgi_server.checkpoint.gguf_file import MAX_NUMBERS, MAX_TENSORS, MAX_TEXTS
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.models import load_model
from tgi_server.options import resolve
from tgi_server.text.text import Text

MEMORY_BYTES = 600 << 20
EXTREMES = (
    0,
    1,
    7,
    31,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
SETTINGS = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
Damage = list[tuple[str, int, int]]


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever takes a gigabyte more than there is now gets an error, which fails the test."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(configure, "usable_memory_bytes", lambda: MEMORY_BYTES)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def start(model: Path) -> str | None:
    """What a start says that refuses `model`; None if it would be served.

    Time is that of this process, so that neighbours do not count; a hang is for pytest's timeout.
    """
    began = time.process_time()
    try:
        values, _ = resolve({"model_id": str(model), "device": "cpu"}, {}, launcher=False)
        _, engine = configure.configurations(values)
        configure.check_checkpoint(values, engine)
        config = ModelConfig.from_folder(engine.model)
        Text.from_folder(engine.model)
        load_model(open_checkpoint(engine.model), config, torch.device("cpu"), torch.float32)
    except StartupError as error:
        assert len(str(error)) < 2000
        return str(error)
    finally:
        assert time.process_time() - began < 1
    return None


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    torch.manual_seed(0)
    write_gguf(path, weights_of(random_llama(tied=False)), GGMLQuantizationType.Q5_1)
    return path.read_bytes()


def numbers_in(data: bytes) -> list[tuple[int, int]]:
    """Where a GGUF header has counts, lengths, types, sizes and offsets, and how many bytes each takes."""
    found: list[tuple[int, int]] = []
    at = 0

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            item, count = number(4), number(8)
            for i in range(count):
                value(item)
                if i > 2:
                    del found[-1]
        else:
            number({0: 1, 1: 1, 2: 2, 3: 2, 7: 1}.get(kind, 8 if kind > 9 else 4))

    number(4), number(4)
    tensors, fields = number(8), number(8)
    for _ in range(fields):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
    return found


def damaged(data: bytes, damage: Damage, places: list[tuple[int, int]]) -> bytes:
    """Each of `damage` is an act, where it happens and a number it uses."""
    changed = bytearray(data)
    for act, where, what in damage:
        end = min(len(changed), places[-1][0] + 8 if places else 4000)
        if end < 100:
            break
        if act == "number" and places:
            at, size = places[where % len(places)]
            changed[at : at + size] = (EXTREMES[what % len(EXTREMES)] % (1 << 8 * size)).to_bytes(
                size, "little"
            )
        elif act == "flip":
            changed[where % end] ^= 1 << what % 8
        elif act == "cut":
            del changed[where % len(changed) :]
        elif act == "drop":
            del changed[where % end : where % end + 1 + what % 64]
        else:  # something once more: a tensor, a field, a part of a text
            piece = changed[where % end : where % end + 1 + what % 200]
            changed[where % end : where % end] = piece
    return bytes(changed)


def some_damage(*acts: str) -> st.SearchStrategy[Damage]:
    number = st.integers(0, 1 << 30)
    return st.lists(st.tuples(st.sampled_from(acts), number, number), min_size=1, max_size=3)


def test_the_undamaged_files_would_be_served(tmp_path: Path, gguf: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf)
    assert start(tmp_path / "model.gguf") is None
    assert start(write_model(tmp_path / "model")) is None
    assert 150 < len(numbers_in(gguf)) < 400


def test_row_105_every_number_of_a_gguf_header_may_lie(tmp_path: Path, gguf: bytes) -> None:
    places = numbers_in(gguf)
    path = tmp_path / "model.gguf"
    refused = 0
    for number, (at, size) in enumerate(places):
        value = EXTREMES[number % len(EXTREMES)] % (1 << 8 * size)
        path.write_bytes(gguf[:at] + value.to_bytes(size, "little") + gguf[at + size :])
        refused += start(path) is not None
    assert refused > len(places) * 0.6


@given(damage=some_damage("number", "flip", "cut", "drop", "again"))
@SETTINGS
def test_row_105_a_damaged_gguf_file_is_refused_or_harmless(
    tmp_path: Path, gguf: bytes, damage: Damage
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged(gguf, damage, numbers_in(gguf)))
    start(path)


@given(damage=some_damage("flip", "cut", "drop", "again"))
@SETTINGS
def test_row_105_a_damaged_safetensors_file_is_refused_or_harmless(tmp_path: Path, damage: Damage) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(damaged(path.read_bytes(), damage, []))
    start(folder)


JUNK: st.SearchStrategy[object] = st.one_of(
    st.sampled_from(
        [*EXTREMES, -1, -(1 << 63), 0.5, 1e308, "", "F32", "BF16", "I64", "F8_E4M3", "U8", None, True]
    ),
    st.lists(st.sampled_from([*EXTREMES, -1, 64, 96, None, "4", [[]]]), max_size=5),
    st.just({}),
)


@given(
    tensor=st.integers(0, 1 << 30), key=st.sampled_from(["dtype", "shape", "data_offsets", None]), junk=JUNK
)
@SETTINGS
def test_row_105_a_safetensors_header_may_say_anything(
    tmp_path: Path, tensor: int, key: str | None, junk: object
) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = sorted(header)[tensor % len(header)]
    if key is None:
        header[name] = junk
    else:
        header[name][key] = junk
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    said = start(folder)
    assert said is not None or json.loads(data[8 : 8 + length]) == header


CONFIG_JUNK = [
    *EXTREMES,
    -1,
    -(1 << 63),
    0.5,
    1e308,
    float("nan"),
    "",
    "64",
    None,
    True,
    [],
    [1, -1],
    {},
    [[[]]],
]
MORE_KEYS = (
    "rope_scaling",
    "rope_theta",
    "quantization_config",
    "head_dim",
    "num_key_value_heads",
    "rms_norm_eps",
)


@pytest.mark.parametrize("junk", CONFIG_JUNK, ids=str)
def test_row_105_every_setting_of_a_config_may_be_anything(tmp_path: Path, junk: object) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in {*config, *MORE_KEYS}:
        path.write_text(json.dumps({**config, key: junk}))
        start(folder)


def test_row_105_a_gguf_header_as_long_as_it_may_be_is_read_in_a_second(tmp_path: Path) -> None:
    """As many texts, numbers and tensors as are read."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    texts = text(b"texts") + struct.pack("<IIQ", 9, 8, MAX_TEXTS) + text(b"ab") * MAX_TEXTS
    numbers = text(b"numbers") + struct.pack("<IIQ", 9, 0, MAX_NUMBERS) + bytes(MAX_NUMBERS)
    tensors = b"".join(
        text(b"%d" % i) + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(MAX_TENSORS - 1)
    )
    path = tmp_path / "model.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, MAX_TENSORS - 1, 2)
    path.write_bytes(header + texts + numbers + tensors + bytes(1 << 23))
    assert "general.architecture is missing" in str(start(path))
