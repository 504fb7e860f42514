"""The weights of a GGUF file under Hugging Face's names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tgi_server.checkpoint.gguf_file import GgufFile, GgufTensor
from tgi_server.checkpoint.gguf_model import heads_of_pairs, stored_name, weights
from tgi_server.errors import StartupError

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufCheckpoint:
    """The tensors of a GGUF file: dense ones as `….weight`, of others the blocks, as `….q4_k.blocks`.

    Blocks are [rows, blocks of a row, bytes of a block] uint8. The file is memory-mapped: a tensor read here is a
    view of it, but for the rows of Llama's q and k, which are put into Hugging Face's order.
    Raises StartupError saying what is wrong with the file, or which tensor is missing.
    """

    def __init__(self, gguf: GgufFile) -> None:
        self.folder: Path = gguf.path  # what errors call it
        self._bytes = torch.frombuffer(gguf.data, dtype=torch.uint8)
        self._tensors = {stored_name(name, tensor): tensor for name, tensor in weights(gguf).items()}
        self._names = frozenset(self._tensors)
        self._gguf = gguf

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `tensor` gives, read from the header alone."""
        found = self._found(name)
        if found.kind.name in _DTYPES:
            return found.shape
        rows, size = found.shape[0], found.kind.size_bytes
        return rows, found.size_bytes // (rows * size), size

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Tensor `name`, as stored; the config asks for `shape`."""
        tensor = self.tensor(name)
        if tuple(tensor.shape) != shape:
            raise StartupError(f"{self.folder}: {name} has shape {tuple(tensor.shape)}; {shape} is asked for")
        return tensor

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, as stored."""
        found = self._found(name)
        data = self._bytes[found.offset : found.offset + found.size_bytes]
        dtype = _DTYPES.get(found.kind.name)
        if dtype is None:
            data = data.view(found.shape[0], -1, found.kind.size_bytes)
        else:
            # The file says how tensors are aligned, and may say: not at all.
            aligned = data if found.offset % dtype.itemsize == 0 else data.clone()
            data = aligned.view(dtype).view(found.shape)
        heads = heads_of_pairs(self._gguf, found)
        return data if heads is None else _in_halves(data, heads)

    def _found(self, name: str) -> GgufTensor:
        found = self._tensors.get(name)
        if found is None:
            raise StartupError(f"{self.folder} has no tensor {name} among its {len(self._tensors)}")
        return found


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's order, rotary pairs side by side, to that of halves. rows: [out, ...]."""
    halves: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves
