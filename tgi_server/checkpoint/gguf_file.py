"""Reading GGUF files: a header walk that trusts nothing, and tensors dequantised to fp32.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader
believes the lengths it finds (a 43-byte file keeps it busy for ever), so only its dequantisation is used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tgi_server.errors import StartupError

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]

# Far above any model in use, far below what would hurt: the largest files have a few thousand tensors,
# vocabularies a few hundred thousand strings, chat templates a few ten thousand bytes.
MAX_TENSORS: Final = 1 << 17
MAX_FIELDS: Final = 1 << 16
MAX_STRING_BYTES: Final = 1 << 24
MAX_ARRAY_ITEMS: Final = 1 << 23
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20
MAX_NUMBER: Final = 1e30  # what fp32 holds; not a number is refused with it

STRING_TYPE: Final = 8
ARRAY_TYPE: Final = 9
# GGUF's number of a scalar type → its struct format, little-endian.
SCALAR_FORMATS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `shape` outermost axis first, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size_bytes: int


class GgufFile:
    """An open GGUF file whose header is read and whose tensors are known to lie inside it.

    Raises StartupError naming the file and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            header = _HeaderReader(self._file, path.stat().st_size, path)
            self.metadata, self.tensors = header.read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def array(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """The values of `tensor` as fp32, in its shape. Raises StartupError if its type is not supported."""
        self._file.seek(tensor.offset)
        data = np.frombuffer(self._file.read(tensor.size_bytes), dtype=np.uint8)
        if data.size != tensor.size_bytes:
            raise StartupError(
                f"{self.path}: {tensor.name} has {data.size} of its {tensor.size_bytes} bytes; "
                "the file shrank while it was read, fetch it again"
            )
        try:
            values = dequantize(data, tensor.kind)
        except NotImplementedError:
            raise StartupError(
                f"{self.path}: {tensor.name} is of type {tensor.kind.name}, which cannot be dequantised; "
                "take a file of another quantisation"
            ) from None
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape)

    def text(self, key: str, default: str | None = None) -> str:
        return _as_text(self._value(key, default), self.path, key)

    def integer(self, key: str, default: int | None = None) -> int:
        return _as_integer(self._value(key, default), self.path, key)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise _wrong_type(self.path, key, value, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float. GGUF stores fp32: the shortest decimal that rounds to it is what the author wrote."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
            raise _wrong_type(self.path, key, value, "a number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise _wrong_type(self.path, key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        return [_as_text(item, self.path, key) for item in self._items(key)]

    def integers(self, key: str) -> list[int]:
        return [_as_integer(item, self.path, key) for item in self._items(key)]

    def _items(self, key: str) -> list[Scalar]:
        value = self._value(key, None)
        if not isinstance(value, list):
            raise _wrong_type(self.path, key, value, "an array")
        return value

    def _value(self, key: str, default: Scalar | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise StartupError(f"{self.path}: {key} is missing; the file does not describe a whole model")
        return value


class _HeaderReader:
    """Walks the header once; every count and length is held against the bytes that are left."""

    def __init__(self, file: BinaryIO, size_bytes: int, path: Path) -> None:
        self.file = file
        self.size_bytes = size_bytes
        self.path = path
        self.position = 0

    def read(self) -> tuple[Mapping[str, Value], Mapping[str, GgufTensor]]:
        if self.take(4) != b"GGUF":
            raise self.error("it does not begin with GGUF; give a .gguf file")
        version = self.scalar("<I")
        if version not in (2, 3):
            raise self.error(f"its GGUF version is {version}; versions 2 and 3, little-endian, are read")
        num_tensors = self.count("tensors", MAX_TENSORS)
        num_fields = self.count("metadata fields", MAX_FIELDS)
        metadata: dict[str, Value] = {}
        for _ in range(num_fields):
            key = self.string()
            if key in metadata:
                raise self.error(f"{key!r} appears twice in its metadata")
            metadata[key] = self.value()
        infos = [self.tensor_info() for _ in range(num_tensors)]
        return metadata, self.place(infos, self.alignment(metadata))

    def place(self, infos: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """Make offsets absolute; refuse tensors that are misaligned, overlap or leave the file."""
        start = -(-self.position // alignment) * alignment
        end = start
        tensors: dict[str, GgufTensor] = {}
        for info in sorted(infos, key=lambda info: info.offset):
            offset = start + info.offset
            if info.name in tensors:
                raise self.error(f"tensor {info.name!r} appears twice")
            if info.offset % alignment or offset < end:
                raise self.error(f"tensor {info.name!r} at byte {offset} is misaligned or overlaps another")
            end = offset + info.size_bytes
            if end > self.size_bytes:
                raise self.error(
                    f"tensor {info.name!r} ends at byte {end}, the file at {self.size_bytes}; fetch it again"
                )
            tensors[info.name] = GgufTensor(info.name, info.shape, info.kind, offset, info.size_bytes)
        return tensors

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.error(
                f"general.alignment is {value!r}; a power of two up to {MAX_ALIGNMENT} is needed"
            )
        return value

    def tensor_info(self) -> GgufTensor:
        """A tensor's entry, its offset still counted from the start of the data."""
        name = self.string()
        num_dims = int(self.scalar("<I"))
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.error(f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are read")
        shape = tuple(int(self.scalar("<Q")) for _ in range(num_dims))[::-1]
        number, offset = int(self.scalar("<I")), int(self.scalar("<Q"))
        try:
            kind = GGMLQuantizationType(number)
            block_values, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self.error(f"tensor {name!r} is of type {number}, which is unknown here") from None
        if min(shape) < 1 or shape[-1] % block_values:
            raise self.error(
                f"tensor {name!r} has shape {shape}, which {kind.name} blocks of {block_values} cannot fill"
            )
        return GgufTensor(name, shape, kind, offset, math.prod(shape) // block_values * block_bytes)

    def value(self) -> Value:
        type_number = int(self.scalar("<I"))
        if type_number != ARRAY_TYPE:
            return self.item_reader(type_number)()
        read_item = self.item_reader(int(self.scalar("<I")))
        return [read_item() for _ in range(self.count("array items", MAX_ARRAY_ITEMS))]

    def item_reader(self, type_number: int) -> Callable[[], Scalar]:
        if type_number == STRING_TYPE:
            return self.string
        layout = SCALAR_FORMATS.get(type_number)
        if layout is None:
            raise self.error(f"a metadata value is of type {type_number}, which is unknown here")
        return lambda: self.scalar(layout)

    def count(self, what: str, limit: int) -> int:
        number = int(self.scalar("<Q"))
        # Each thing counted takes at least a byte, so a count above the bytes left is a lie.
        if number > min(limit, self.size_bytes - self.position):
            raise self.error(
                f"it claims {number} {what} with {self.size_bytes - self.position} bytes left (limit {limit})"
            )
        return number

    def string(self) -> str:
        length = self.count("bytes of text", MAX_STRING_BYTES)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("a text is not UTF-8") from None

    def scalar(self, layout: str) -> bool | int | float:
        value: bool | int | float = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def take(self, num_bytes: int) -> bytes:
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.error(f"{num_bytes} bytes are needed, {len(data)} are left; fetch the file again")
        self.position += num_bytes
        return data

    def error(self, message: str) -> StartupError:
        return StartupError(f"{self.path} is not a sound GGUF file: at byte {self.position}, {message}")


def _as_text(value: Value, path: Path, key: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(path, key, value, "a text")
    return value


def _as_integer(value: Value, path: Path, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(path, key, value, "a whole number")
    return value


def _wrong_type(path: Path, key: str, value: Value, wanted: str) -> StartupError:
    shown = f"an array of {len(value)}" if isinstance(value, list) else repr(value)
    return StartupError(f"{path}: {key} is {shown}; {wanted} is needed")
