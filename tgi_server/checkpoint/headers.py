"""Which files with weights a folder has and what their headers say, without torch and without reading weights.

Every number in a header is checked against the file's size before anything is read by it, and errors name the file
and the offset. Safetensors: 8 bytes with the header's length, the header (JSON), then the tensors' bytes without gaps;
GGUF: see gguf_file.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Final, NoReturn, TypeGuard

from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.checkpoint.gguf_folder import gguf_of
from tgi_server.checkpoint.gguf_model import weights
from tgi_server.errors import StartupError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")

_LAYER: Final = re.compile(r"model\.layers\.(\d{1,9})\.")
_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_MAX_AXES: Final = 64
_MAX_INDEX_BYTES: Final = 100_000_000
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type as the file writes it ("BF16"), its shape, where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # counted from the end of the header, as `end`
    end: int


def stored_tensors(folder: Path) -> dict[str, Entry]:
    """What the headers in the folder say of each tensor; empty without files.

    Files that are not there are no error: a plan can do without. Raises StartupError naming one that is damaged.
    """
    if path := gguf_of(folder):
        found = weights(GgufFile(path)).items()
        return {name: Entry(t.kind.name, t.shape, t.offset, t.offset + t.size_bytes) for name, t in found}
    headers = (read_header(path) for path in sorted(folder.glob("model*.safetensors")))
    return dict(chain.from_iterable(header.items() for header in headers))


def check_files(folder: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors, all of which are there and whole as far as headers and sizes tell.

    Raises StartupError naming what is missing or damaged.
    """
    if gguf := gguf_of(folder):
        return frozenset(weights(GgufFile(gguf)))
    names: set[str] = set()
    for path, promised in tensor_files(folder).items():
        held = read_header(path).keys()
        if missing := promised - held:
            raise StartupError(
                f"{path} lacks {len(missing)} tensors that {INDEX_FILE} promises, {min(missing)} "
                "among them; fetch the file again"
            )
        names |= promised or held
    return frozenset(names)


def check_layers(names: Iterable[str], num_layers: int) -> None:
    """Raises StartupError if there are layers that config.json does not count: half a model answers nonsense."""
    numbers = (_LAYER.match(name) for name in names)
    most = max((int(found[1]) for found in numbers if found), default=-1)
    if most >= num_layers:
        raise StartupError(
            f"config.json: num_hidden_layers is {num_layers}, but the checkpoint has model.layers.{most}; "
            "one of the two belongs to another model"
        )


def tensor_files(folder: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint and the tensors each must hold; none named: all that it holds.

    Raises StartupError saying what the folder lacks.
    """
    if not folder.is_dir():
        raise StartupError(f"{folder} is no folder; give one that holds {SINGLE_FILE} and config.json")
    if gguf := gguf_of(folder):
        return {gguf: set()}
    if (folder / SINGLE_FILE).exists():
        return {folder / SINGLE_FILE: set()}
    if (folder / INDEX_FILE).exists():
        return _shards(folder)
    others = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in others if name.endswith(PICKLE_SUFFIXES)]:
        raise StartupError(
            f"{folder} holds {', '.join(pickles[:3])} and no safetensors; such files can run code when "
            "they are read. Convert them where they are trusted: load with transformers, then save_pretrained"
        )
    if ggufs := [name for name in others if name.endswith(".gguf")]:
        raise StartupError(
            f"{folder} holds {ggufs[0]} and no safetensors; give the file itself: {folder / ggufs[0]}"
        )
    raise StartupError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; its files: {others[:8]}")


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises StartupError naming file and offset if it is damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES:
                _damaged(path, f"it has {size} bytes, not even the 8 of its header's length")
            if length > _MAX_HEADER_BYTES:
                _damaged(path, f"at offset 0: a header of {length} bytes, more than {_MAX_HEADER_BYTES}")
            if _LENGTH_BYTES + length > size:
                _damaged(path, f"at offset 8: a header of {length} bytes in a file that ends at {size}")
            content = _parsed(path, file.read(length))
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from None
    entries = {name: _entry(path, name, value) for name, value in content.items() if name != "__metadata__"}
    _check_extents(path, entries, _LENGTH_BYTES + length, size)
    return entries


def _damaged(path: Path, why: str) -> NoReturn:
    raise StartupError(f"{path} cannot be read, {why}; it is damaged or incomplete, fetch it again")


def _parsed(path: Path, header: bytes) -> Mapping[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"it names {twice[:100]!r} twice")
        return found

    try:
        content = json.loads(header.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        _damaged(path, f"at offset {_LENGTH_BYTES + error.start}: its header is no UTF-8")
    except json.JSONDecodeError as error:
        _damaged(path, f"at offset {_LENGTH_BYTES + error.pos}: its header is no JSON ({error.msg})")
    except (ValueError, RecursionError) as error:
        _damaged(path, f"at offset 8: its header is no list of tensors ({error})")
    if not isinstance(content, dict):
        _damaged(path, "at offset 8: its header is no JSON object")
    return dict(content)


def _entry(path: Path, name: str, value: object) -> Entry:
    entry = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        _damaged(path, f"tensor {name[:100]!r} has type {str(dtype)[:40]!r}, which is unknown")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        _damaged(path, f"tensor {name[:100]!r} has shape {str(shape)[:80]} and offsets {str(offsets)[:80]}")
    bits = prod(shape) * _BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        _damaged(
            path,
            f"tensor {name[:100]!r} has shape {str(shape)[:80]} of {dtype}, {-(-bits // 8)} bytes, but lies at "
            f"{offsets[0]} … {offsets[1]}",
        )
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _check_extents(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors follow each other without holes and overlaps, up to the end of the file. start: of the data, in bytes."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps the one before" if entry.begin < at else "leaves a hole"
            _damaged(
                path,
                f"tensor {name[:100]!r} at offset {start + entry.begin} {what}, which ends at {start + at}",
            )
        at = entry.end
        if start + at > size:
            _damaged(path, f"tensor {name[:100]!r} ends at offset {start + at}, the file at {size}")
    if start + at < size:
        _damaged(path, f"its last tensor ends at offset {start + at}, the file at {size}")


def _shards(folder: Path) -> dict[Path, set[str]]:
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not JSON ({error}); fetch it again") from None
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{path} has no weight_map of tensors to files; fetch it again")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        # A bare name cannot leave the folder; links inside it, as the Hub's cache makes them, are followed.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise StartupError(
                f"{path} puts {name} into {file!r}; the bare name of a .safetensors file is needed"
            )
        shards.setdefault(folder / file, set()).add(name)
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise StartupError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards, {missing[0]} among them; fetch it"
        )
    return shards
