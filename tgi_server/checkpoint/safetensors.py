"""A Hugging Face folder's weights, tensor by tensor or by rows, from one safetensors file or several."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgi_server.checkpoint.gguf_folder import gguf_of
from tgi_server.checkpoint.headers import INDEX_FILE, read_header, tensor_files
from tgi_server.errors import StartupError


class Checkpoint:
    """The tensors of a folder by name.

    Files are memory-mapped: a tensor read here is a view of its file, valid until the file changes. Whoever
    keeps one copies it. Headers are checked against the size of their files when the folder is opened.
    Raises StartupError saying which file or tensor is missing or damaged, and what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if gguf := gguf_of(folder):
            raise StartupError(
                f"{gguf} is served as it is; what quantises reads safetensors. Take the model's own folder, or write "
                f"one: python -m tgi_server.checkpoint.gguf {gguf} NEW_FOLDER"
            )
        # safe_open has no public class to name: it is what the library returns for a file.
        self._file_of: dict[str, Any] = {}
        for path, promised in tensor_files(folder).items():
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


def _open(path: Path) -> Any:
    read_header(path)  # says more than the library of what is wrong, and where
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{path} cannot be read ({error}); fetch it again") from None
