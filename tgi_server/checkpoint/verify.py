"""`--verify`: every file of a checkpoint against a checksum that came another way than the file. Knows no torch.

Three places know checksums, the first that knows a file's counts: a file `SHA256SUMS` in the folder (as sha256sum
writes it); the Hub's cache, whose files are links to blobs named after their content; and the notes that a download
into a folder leaves under `.cache/huggingface`. The Hub names large files by SHA-256, small ones as git does.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tgi_server.checkpoint.gguf_folder import gguf_of
from tgi_server.checkpoint.headers import tensor_files
from tgi_server.errors import StartupError

SUMS_FILE: Final = "SHA256SUMS"

_READ_AT_ONCE: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_SUM: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's, or SHA-256
_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Verified:
    """What was compared."""

    files: int
    size_bytes: int
    unknown: tuple[str, ...]  # small files that nobody has a checksum of


def verify(folder: Path, threads: int) -> Verified:
    """Read all files of a checkpoint and compare their checksums, several files at a time.

    Raises StartupError naming the file that differs, or one with weights whose checksum is not known.
    """
    weights = list(tensor_files(folder))
    if gguf := gguf_of(folder):
        folder, files = gguf.parent, [gguf]
    else:
        files = sorted({path for pattern in _READ_AT_ONCE for path in folder.glob(pattern) if path.is_file()})
    listed = _listed(folder)
    known = {path: found for path in files if (found := _expected(path, listed))}
    if without := [path.name for path in weights if path not in known]:
        raise StartupError(
            f"--verify: nobody knows the checksum of {without[0]}; fetch {folder.name} from the Hub, or write "
            f"{folder / SUMS_FILE} where the files can be trusted: sha256sum *.json *{weights[0].suffix} > {SUMS_FILE}"
        )
    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(lambda path: _compare(path, known[path]), known))
    return Verified(len(sizes), sum(sizes), tuple(path.name for path in files if path not in known))


def _listed(folder: Path) -> Mapping[str, str]:
    """The checksums of `SHA256SUMS` by the name of their file."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not _SUM.fullmatch(digest.lower()):
            raise StartupError(f"{path}, line {number}: a SHA-256 and the name of a file are needed")
        found[name.lstrip(" *").removeprefix("./")] = digest.lower()
    return found


def _expected(path: Path, listed: Mapping[str, str]) -> str | None:
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    lines = note.read_text(encoding="utf-8").split("\n") if note.is_file() else []
    candidates = (
        listed.get(path.name, ""),
        Path(os.readlink(path)).name if path.is_symlink() else "",
        lines[1].strip() if len(lines) > 1 else "",
    )
    return next((candidate for candidate in candidates if _SUM.fullmatch(candidate)), None)


def _compare(path: Path, expected: str) -> int:
    """The file's size in bytes, if it is what it should be."""
    size = path.stat().st_size
    if len(expected) == 64:
        found = _digest(path, hashlib.sha256)
    else:
        found = _digest(path, lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
    if found != expected:
        raise StartupError(
            f"--verify: {path} has checksum {found}, {expected} is expected; it is damaged or was changed, fetch it "
            "again"
        )
    return size


def _digest(path: Path, begin: Callable[[], hashlib._Hash]) -> str:
    digest = begin()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise StartupError(f"--verify: {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
