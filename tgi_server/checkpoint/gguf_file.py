"""GGUF files: a header walk that trusts nothing. Knows no torch.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's reader believes the lengths
it finds: a file of 43 bytes keeps it busy for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tgi_server.errors import StartupError

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]

# Far above any model in use, far below what would hurt: the largest files have two thousand tensors,
# vocabularies and their merges half a million texts, chat templates a few ten thousand bytes.
MAX_TENSORS: Final = 1 << 14
MAX_FIELDS: Final = 1 << 16
MAX_HEADER_BYTES: Final = 1 << 28
MAX_STRING_BYTES: Final = 1 << 20
MAX_TEXTS: Final = 3 << 18  # of all arrays together, as the next
MAX_NUMBERS: Final = 1 << 21
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20
MAX_NUMBER: Final = 1e30  # what fp32 holds; not a number is refused with it

_NUMBER: Final = struct.Struct("<I")
_LENGTH: Final = struct.Struct("<Q")
STRING_TYPE: Final = 8
ARRAY_TYPE: Final = 9
# GGUF's number of a scalar type → its letter in struct's language.
SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Kind:
    """A type of tensors: `values` that follow each other in a row are one block of `size_bytes`."""

    name: str
    values: int
    size_bytes: int


# GGUF's number of a type of tensors that is read → what it is.
KINDS: Final = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    30: Kind("BF16", 1, 2),
}
# Those that are refused by name.
OTHER_KINDS: Final = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `shape` outermost axis first, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    offset: int
    size_bytes: int


class GgufFile:
    """A mapped GGUF file whose header is read and whose tensors are known to lie inside it.

    `data` is its bytes, private to this process, valid as long as something refers to it and the file does not
    shrink. Raises StartupError naming the file and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Copied when written, which nobody does: torch wants memory that could be.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise StartupError(f"{path} is not a sound GGUF file: it is empty; fetch it again") from None
        except OSError as error:
            raise StartupError(f"{path} cannot be read: {error.strerror}") from None
        self.metadata, self.tensors = _HeaderReader(self.data, path).read()

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
        return _shortest(float(value))

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise _wrong_type(self.path, key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        return [_as_text(item, self.path, key) for item in self._items(key)]

    def integers(self, key: str) -> list[int]:
        return [_as_integer(item, self.path, key) for item in self._items(key)]

    def floats_of(self, key: str) -> list[float]:
        found = self._items(key)
        if not all(isinstance(item, float) for item in found):
            raise _wrong_type(self.path, key, found, "an array of floats")
        return [float(item) for item in found]

    def floats(self, tensor: GgufTensor) -> list[float]:
        """The numbers of a small tensor in F32."""
        return list(struct.unpack_from(f"<{math.prod(tensor.shape)}f", self.data, tensor.offset))

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

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.size_bytes = len(data)
        self.path = path
        self.end = min(self.size_bytes, MAX_HEADER_BYTES)  # of what may be header
        self.position = 0
        self.texts_left = MAX_TEXTS
        self.numbers_left = MAX_NUMBERS

    def read(self) -> tuple[Mapping[str, Value], Mapping[str, GgufTensor]]:
        if self.take(4) != b"GGUF":
            raise self.error("it does not begin with GGUF; give a .gguf file")
        version = self.whole(_NUMBER)
        if version not in (2, 3):
            raise self.error(f"its GGUF version is {version}; versions 2 and 3, little-endian, are read")
        num_tensors = self.count("tensors", MAX_TENSORS)
        num_fields = self.count("metadata fields", MAX_FIELDS)
        metadata: dict[str, Value] = {}
        for _ in range(num_fields):
            key = self.string()
            if key in metadata:
                raise self.error(f"{key[:100]!r} appears twice in its metadata")
            metadata[key] = self.value()
        infos = [self.tensor_info() for _ in range(num_tensors)]
        return metadata, self.place(infos, self.alignment(metadata))

    def place(self, infos: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """Make offsets absolute; refuse tensors that are misaligned, overlap or leave the file."""
        start = -(-self.position // alignment) * alignment
        end = start
        tensors: dict[str, GgufTensor] = {}
        for info in sorted(infos, key=lambda info: info.offset):
            offset, name = start + info.offset, info.name[:100]
            if info.name in tensors:
                raise self.error(f"tensor {name!r} appears twice")
            if info.offset % alignment or offset < end:
                raise self.error(f"tensor {name!r} at byte {offset} is misaligned or overlaps another")
            end = offset + info.size_bytes
            if end > self.size_bytes:
                raise self.error(
                    f"tensor {name!r} ends at byte {end}, the file at {self.size_bytes}; fetch it again"
                )
            tensors[info.name] = GgufTensor(info.name, info.shape, info.kind, offset, info.size_bytes)
        return tensors

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.error(
                f"general.alignment is {str(value)[:40]}; a power of two up to {MAX_ALIGNMENT} is needed"
            )
        return value

    def tensor_info(self) -> GgufTensor:
        """A tensor's entry, its offset still counted from the start of the data."""
        name = self.string()
        short = name[:100]
        num_dims = self.whole(_NUMBER)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.error(f"tensor {short!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are read")
        shape = tuple(self.whole(_LENGTH) for _ in range(num_dims))[::-1]
        number, offset = self.whole(_NUMBER), self.whole(_LENGTH)
        kind = KINDS.get(number)
        if kind is None:
            known = OTHER_KINDS.get(number)
            raise self.error(
                f"tensor {short!r} is of type {known or number}, which is {'not served' if known else 'unknown'}; take "
                f"a file of {', '.join(kind.name for kind in KINDS.values())}"
            )
        if min(shape) < 1 or shape[-1] % kind.values:
            raise self.error(
                f"tensor {short!r} has shape {shape}, which {kind.name} blocks of {kind.values} cannot fill"
            )
        return GgufTensor(name, shape, kind, offset, math.prod(shape) // kind.values * kind.size_bytes)

    def value(self) -> Value:
        type_number = self.whole(_NUMBER)
        if type_number == STRING_TYPE:
            return self.string()
        if type_number != ARRAY_TYPE:
            return self.numbers(self.letter(type_number), 1)[0]
        type_number = self.whole(_NUMBER)
        if type_number == STRING_TYPE:
            count = self.count("array items", self.texts_left, least_bytes=8)
            self.texts_left -= count
            return self.strings(count)
        letter = self.letter(type_number)
        count = self.count("array items", self.numbers_left, least_bytes=struct.calcsize(letter))
        self.numbers_left -= count
        return self.numbers(letter, count)

    def letter(self, type_number: int) -> str:
        letter = SCALARS.get(type_number)
        if letter is None:
            raise self.error(f"a metadata value is of type {type_number}, which is unknown here")
        return letter

    def count(self, what: str, limit: int, least_bytes: int = 1) -> int:
        """How many there are of something that takes `least_bytes` each: a count above the bytes left is a lie."""
        number = self.whole(_LENGTH)
        if number > min(limit, (self.end - self.position) // least_bytes):
            raise self.error(
                f"it claims {number} {what} with {self.end - self.position} bytes left (limit {limit})"
            )
        return number

    def string(self) -> str:
        length = self.count("bytes of text", MAX_STRING_BYTES)
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.error("a text is not UTF-8") from None

    def strings(self, count: int) -> list[Scalar]:
        """As `string`, in a loop without calls: vocabularies have half a million."""
        data, end, texts = self.data, self.end, list[Scalar]()
        add, unpack = texts.append, _LENGTH.unpack_from
        stop = self.position
        try:
            for _ in range(count):
                start = stop + 8
                stop = start + unpack(data, stop)[0] if start <= end else end + 1
                if stop > end or stop - start > MAX_STRING_BYTES:
                    self.position = start - 8
                    raise self.error("a text in an array is longer than the file or a megabyte")
                add(data[start:stop].decode())
        except UnicodeDecodeError:
            self.position = start
            raise self.error("a text is not UTF-8") from None
        self.position = stop
        return texts

    def numbers(self, letter: str, count: int) -> list[Scalar]:
        layout = f"<{count}{letter}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))

    def whole(self, layout: struct.Struct) -> int:
        return int(layout.unpack(self.take(layout.size))[0])

    def take(self, num_bytes: int) -> bytes:
        data = self.data[self.position : min(self.position + num_bytes, self.end)]
        if len(data) != num_bytes:
            raise self.error(f"{num_bytes} bytes are needed, {len(data)} are left; fetch the file again")
        self.position += num_bytes
        return data

    def error(self, message: str) -> StartupError:
        return StartupError(f"{self.path} is not a sound GGUF file: at byte {self.position}, {message}")


def _shortest(value: float) -> float:
    """The decimal of fewest digits that fp32 rounds to the same number."""
    stored = struct.pack("<f", value)
    candidates = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((short for short in candidates if struct.pack("<f", short) == stored), value)


def _as_text(value: Value, path: Path, key: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(path, key, value, "a text")
    return value


def _as_integer(value: Value, path: Path, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(path, key, value, "a whole number")
    return value


def _wrong_type(path: Path, key: str, value: Value, wanted: str) -> StartupError:
    shown = f"an array of {len(value)}" if isinstance(value, list) else repr(value)[:100]
    return StartupError(f"{path}: {key} is {shown}; {wanted} is needed")
