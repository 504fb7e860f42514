"""A GGUF file as a folder like those of the Hub: its description as JSON files, and a link to the file. Knows no torch.

Front end and engine read such a folder as any other. It lies in the Hub library's cache for what others derive
(HF_ASSETS_CACHE) and is made anew for a file of another size or time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from huggingface_hub import constants

from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.checkpoint.gguf_model import DENSE, generation_config, model_config
from tgi_server.errors import StartupError

LINK: Final = "model.gguf"
DESCRIPTION: Final = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def folder_of(path: Path) -> Path:
    """The folder that stands for the GGUF file `path`.

    Raises StartupError saying what is wrong with the file, or that the folder cannot be written.
    """
    path = path.absolute()
    stat = path.stat()
    key = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n{metadata.version('tgi-server')}"
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    folder = Path(constants.HF_ASSETS_CACHE, "tgi-server", "gguf", f"{path.stem[:80]}-{digest[:16]}")
    if not all((folder / name).is_file() for name in (*DESCRIPTION, LINK)):
        try:
            _make(GgufFile(path), folder)
        except OSError as error:
            raise StartupError(
                f"{folder}, for the config and tokenizer of {path.name}, cannot be written ({error}); choose a folder "
                "that can with HF_ASSETS_CACHE"
            ) from None
    return folder


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file that `folder` stands for, under the name it was given; None if it is a folder like any other."""
    link = folder / LINK
    return link.readlink() if link.is_symlink() else None


def write_description(gguf: GgufFile, folder: Path, quantization: dict[str, Any] | None = None) -> None:
    """Write the files DESCRIPTION names. quantization: config.json's `quantization_config`."""
    # The library of tokenizers is for GGUF files alone: all commands come through this module.
    from tgi_server.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config  # noqa: PLC0415

    config = model_config(gguf)
    if quantization:
        config["quantization_config"] = quantization
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(gguf))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
    build_tokenizer(gguf).save(str(folder / "tokenizer.json"))


def _make(gguf: GgufFile, folder: Path) -> None:
    """All of the folder or nothing of it; another process may be making the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    kinds = sorted({tensor.kind.name for tensor in gguf.tensors.values()} - set(DENSE))
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        write_description(gguf, new, {"quant_method": "gguf", "types": kinds} if kinds else None)
        (new / LINK).symlink_to(gguf.path)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            new.rename(folder)
        except OSError:
            if not (folder / LINK).exists():
                raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
