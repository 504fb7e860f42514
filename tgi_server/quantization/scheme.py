"""What every format of quantised checkpoints offers: which matrices it covers, and their codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tgi_kernels.quant_segments import Segments
from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError

Section = Mapping[str, object]  # the part of a config that speaks of quantisation


class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    folder: Path

    def names(self) -> frozenset[str]:
        """All there are."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, read from the header alone. Raises StartupError if it is missing."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as stored. Raises StartupError if it is missing or its shape is another."""


class Scheme(Protocol):
    """One format, with the settings that a checkpoint's config gives."""

    @property
    def title(self) -> str:
        """Format and settings in a few words."""

    @property
    def leaf(self) -> str:
        """How the name of a tensor begins that each quantised matrix has and no dense one."""

    def covers(self, tensors: Tensors, name: str) -> bool:
        """Whether matrix `name` (without ".weight") is quantised. Raises StartupError if tensors contradict it."""

    def read(
        self, tensors: Tensors, name: str, out_features: int, in_features: int
    ) -> QuantWeight | Segments:
        """Matrix `name` as codes. Raises StartupError naming the tensor that contradicts another or the config."""


def replaces_weight(leaf: str, tensors: Tensors, name: str) -> bool:
    """Whether matrix `name` has `leaf` in place of "weight". Raises StartupError if it has both."""
    names = tensors.names()
    if f"{name}.{leaf}" not in names:
        return False
    if f"{name}.weight" in names:
        raise StartupError(
            f"{tensors.folder} holds {name}.{leaf} and {name}.weight; a matrix is quantised or dense, not both. "
            "Remove the one that does not belong"
        )
    return True


def read_as(tensors: Tensors, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """Tensor `name` of one of `dtypes`."""
    tensor = tensors.read(name, shape)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise StartupError(
            f"{tensors.folder}: {name} is stored as {tensor.dtype}; its format asks for {wanted}"
        )
    return tensor


def read_scales(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Tensor:
    """Scales as float16 or bfloat16. Raises StartupError for NaN, infinity, all zeros, and what 16 bits cannot hold."""
    scales = read_as(tensors, name, shape, torch.float16, torch.bfloat16, torch.float32)
    if bad := int((~scales.isfinite()).sum()):
        raise StartupError(
            f"{tensors.folder}: {bad} of {scales.numel()} scales in {name} are NaN or infinite; "
            "quantise the model again"
        )
    if not scales.any():
        raise StartupError(
            f"{tensors.folder}: all {scales.numel()} scales in {name} are zero; quantise the model again"
        )
    if scales.dtype != torch.float32:
        return scales
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    raise StartupError(
        f"{tensors.folder}: {name} holds float32 scales that neither float16 nor bfloat16 can hold; round them where "
        "the model was quantised"
    )


def group_count(where: str, in_features: int, group_size: int) -> tuple[int, int]:
    """Number and size of the groups of a matrix; a size of -1 is one group of all columns."""
    size = in_features if group_size == -1 else group_size
    if in_features % size:
        raise StartupError(
            f"{where}: group_size {group_size} does not divide the matrix's {in_features} columns; quantise the model "
            "with a size that does"
        )
    if size % 8 and size != in_features:
        raise StartupError(f"{where}: group_size is {group_size}; multiples of 8, and -1, are served")
    return in_features // size, size


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of `bits` bits that follow each other, lowest bits first, in the int32 words of each row.

    words: [rows, words] int32. Returns [rows, count] uint8.
    """
    if 32 % bits == 0:
        per_word = 32 // bits
        codes = torch.empty((*words.shape, per_word), dtype=torch.uint8)
        for i in range(per_word):
            codes[:, :, i] = (words >> (bits * i)) & ((1 << bits) - 1)
        return codes.flatten(1)[:, :count]
    wide = words.long() & 0xFFFFFFFF
    next_word = torch.cat([wide[:, 1:], torch.zeros_like(wide[:, :1])], 1)
    pairs = wide | (
        next_word << 32
    )  # the sign bit is bit 63: shifts by at most 31 bring none of it down to a code
    first = torch.arange(count) * bits
    return ((pairs[:, first // 32] >> (first % 32)) & ((1 << bits) - 1)).to(torch.uint8)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """The reverse of `unpack_stream`: [rows, count] uint8 to [rows, ⌈count · bits / 32⌉] int32."""
    rows, count = codes.shape
    words = torch.zeros(rows, -(-count * bits // 32) + 1, dtype=torch.int64)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        code = codes[:, i].long() << shift
        words[:, word] |= code & 0xFFFFFFFF
        words[:, word + 1] |= code >> 32
    words = words[:, :-1]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def choice(section: Section, key: str, allowed: tuple[object, ...], default: object, where: str) -> object:
    """section[key], one of `allowed`."""
    value = section.get(key, default)
    if value not in allowed or isinstance(value, bool) != isinstance(default, bool):
        raise StartupError(f"{where}: {key} is {value!r}; served are {', '.join(map(repr, allowed))}")
    return value


def group_size_of(section: Section, key: str, where: str) -> int:
    """section[key]: columns that share a scale, -1 for all."""
    size = section.get(key, -1)
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 1):
        raise StartupError(
            f"{where}: {key} is {size!r}; a positive number of columns is needed, or -1 for all"
        )
    return size
