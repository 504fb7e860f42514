"""A Hugging Face folder's weights, tensor by tensor or by rows, from one safetensors file or several."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgi_server.errors import StartupError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """The tensors of a folder by name.

    Files are memory-mapped: a tensor read here is a view of its file, valid until the file changes. Whoever
    keeps one copies it. Headers are checked against the size of their files when the folder is opened.
    Raises StartupError saying which file or tensor is missing or damaged, and what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # safe_open has no public class to name: it is what the library returns for a file.
        self._file_of: dict[str, Any] = {}
        for path, promised in _files(folder).items():
            file = _open(path)
            held = set(file.keys())
            if missing := promised - held:
                raise StartupError(
                    f"{path} lacks {len(missing)} tensors that {INDEX_FILE} promises, {min(missing)} "
                    "among them; fetch the file again"
                )
            self._file_of.update(dict.fromkeys(promised or held, file))

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, read from the header alone."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, as stored."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Tensor `name`, as stored; the config asks for `shape`."""
        found = self.shape(name)
        if found != shape:
            raise StartupError(
                f"{self.folder}: {name} has shape {found}; config.json asks for {shape}. "
                "One of the two belongs to another model"
            )
        return self.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first axis of tensor `name`; only they are read."""
        shape = self.shape(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise StartupError(
                f"{self.folder}: rows {start} to {stop} of {name} are asked for, its shape is {shape}"
            )
        rows: Tensor = self._file(name).get_slice(name)[start:stop]
        return rows

    def _file(self, name: str) -> Any:
        try:
            return self._file_of[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._file_of, n=3, cutoff=0.6)
            hint = f"; similar: {', '.join(near)}" if near else ""
            raise StartupError(
                f"{self.folder} has no tensor {name} among its {len(self._file_of)}; its weights do not "
                f"fit its config.json{hint}"
            ) from None


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files to open and the tensors each must hold; none named: all that it holds."""
    if not folder.is_dir():
        raise StartupError(f"{folder} is no folder; give one that holds {SINGLE_FILE} and config.json")
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
            f"{folder} holds {ggufs[0]} and no safetensors; convert it: "
            f"python -m tgi_server.checkpoint.gguf {folder / ggufs[0]} NEW_FOLDER"
        )
    raise StartupError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; its files: {others[:8]}")


def _shards(folder: Path) -> dict[Path, set[str]]:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not JSON ({error}); fetch it again") from None
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{path} cannot be read ({error}); fetch it again") from None
