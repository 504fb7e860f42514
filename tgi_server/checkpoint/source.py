"""The weights of a folder, whichever way they are stored."""

from __future__ import annotations

from pathlib import Path

from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.checkpoint.gguf_folder import gguf_of
from tgi_server.checkpoint.gguf_source import GgufCheckpoint
from tgi_server.checkpoint.safetensors import Checkpoint


def open_checkpoint(folder: Path) -> Checkpoint | GgufCheckpoint:
    """Raises StartupError saying which file or tensor is missing or damaged."""
    gguf = gguf_of(folder)
    return GgufCheckpoint(GgufFile(gguf)) if gguf else Checkpoint(folder)
