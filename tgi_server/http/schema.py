"""JSON bodies, read field by field: every value checked, every error naming the field as it was sent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NoReturn
from urllib.parse import quote

import msgspec

from tgi_server.errors import ErrorKind, UserError

INT32_MAX = 2**31 - 1

# Of JSON that is handed on as it is; a microsecond or two each, in which no stream moves.
_MAX_DEPTH, _MAX_VALUES = 64, 50_000
_IGNORED_HEADER_NAMES = 20
_IGNORED_HEADER_BYTES = 256


def parse_object(body: bytes) -> dict[str, object]:
    """The JSON object in `body`; of a key given twice the last value counts.

    Raises UserError (UNPARSABLE) for all that is not one: NaN, 1e400, lone surrogates, 100 000 brackets.
    """
    body = body.removeprefix(b"\xef\xbb\xbf")
    if not body.strip():
        raise UserError(ErrorKind.UNPARSABLE, "the body is empty; send a JSON object")
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start} of a string"
        raise UserError(ErrorKind.UNPARSABLE, f"the body is not UTF-8: {reason}") from None
    except RecursionError:
        raise UserError(ErrorKind.UNPARSABLE, "the body is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise UserError(ErrorKind.UNPARSABLE, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(ErrorKind.UNPARSABLE, f"the body is {kind_of(value)}; send a JSON object")
    return value


def kind_of(value: object) -> str:
    """What JSON calls a value, for messages."""
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "a string"),
        (list, "an array"),
        (dict, "an object"),
    )
    return next((kind for type_, kind in kinds if isinstance(value, type_)), "null")


def shown(value: object) -> str:
    """A client's value in a message: short, and escaped so that it cannot forge log lines."""
    text = kind_of(value) if isinstance(value, (list, dict)) else json.dumps(value, ensure_ascii=False)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """One JSON object being read. It remembers what was asked for, so that the rest can be named.

    Every reader returns None for a field that is absent or null.
    """

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = values
        self._path = path
        self._known: set[str] = set()
        self._children: list[Fields] = []

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def names(self) -> list[str]:
        return list(self._values)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        self._known.add(name)
        return self._values.get(name) is not None

    def know(self, *names: str) -> None:
        """Fields that are labels and change nothing, whatever they hold."""
        self._known.update(names)

    def raw(self, name: str) -> object:
        self._known.add(name)
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.raw(name)
        return None if value is None else check_integer(value, self.path(name), low, high)

    def number(self, name: str, low: float, high: float, *, above: float | None = None) -> float | None:
        """above: the value must also be greater than this."""
        value = self.raw(name)
        return None if value is None else check_number(value, self.path(name), low, high, above)

    def flag(self, name: str) -> bool | None:
        value = self.raw(name)
        return None if value is None else check_flag(value, self.path(name))

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        return None if value is None else check_text(value, self.path(name))

    def items(self, name: str, most: int) -> list[object] | None:
        """An array of at most `most` elements."""
        value = self.raw(name)
        return None if value is None else check_items(value, self.path(name), most)

    def child(self, name: str) -> Fields | None:
        """The object under `name`."""
        value = self.raw(name)
        if value is None:
            return None
        child = Fields(check_object(value, self.path(name)), self.path(name))
        self._children.append(child)
        return child

    def refuse_all(self, *names: str) -> None:
        """Fields of features this server does not have: an error if one is there."""
        self._known.update(names)
        for name in names:
            if self._values.get(name) is not None:
                self.refuse(name, "is not supported by this server yet; leave it out")

    def neutral(self, name: str, *neutral: object) -> None:
        """A field of a feature this server does not have, which may carry a value that asks for nothing."""
        value = self.raw(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            self.refuse(name, f"is {shown(value)}, which this server does not support yet; leave it out")

    def refuse(self, name: str, why: str) -> NoReturn:
        invalid(self.path(name), why)

    def ignored(self) -> list[str]:
        """The fields nobody asked for, here and below."""
        names = [self.path(name) for name in self._values if name not in self._known]
        for child in self._children:
            names += child.ignored()
        return names


def invalid(path: str, why: str) -> NoReturn:
    raise UserError(ErrorKind.INVALID, f"{path} {why}", path)


def check_integer(value: object, path: str, low: int, high: int) -> int:
    """A whole number, also when a client's language wrote it as 5.0."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        invalid(path, f"is {shown(value)}; give a whole number from {low} to {high}")
    return number


def check_number(value: object, path: str, low: float, high: float, above: float | None = None) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or not isinstance(value, (int, float)) or (above is not None and value <= above):
        floor = f"from {low:g}" if above is None else f"above {above:g}"
        invalid(path, f"is {shown(value)}; give a number {floor} to {high:g}")
    return math.copysign(0.0, 1.0) if value == 0 else float(value)


def check_flag(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        invalid(path, f"is {shown(value)}; give true or false")
    return value


def check_text(value: object, path: str) -> str:
    if not isinstance(value, str):
        invalid(path, f"is {kind_of(value)}; give a string")
    return value


def check_items(value: object, path: str, most: int) -> list[object]:
    if not isinstance(value, list):
        invalid(path, f"is {kind_of(value)}; give an array")
    if len(value) > most:
        invalid(path, f"has {len(value)} elements; at most {most} are allowed")
    return value


def check_object(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict):
        invalid(path, f"is {kind_of(value)}; give an object")
    return value


def check_json(value: object, path: str) -> None:
    """JSON that is handed on to a template as it is: not too deep, not too much, and no integer over 64 bits."""
    layer, count = [value], 0
    for _ in range(_MAX_DEPTH + 1):
        deeper: list[object] = []
        for one in layer:
            if isinstance(one, (list, dict)):
                deeper.extend(one.values() if isinstance(one, dict) else one)
            elif isinstance(one, int) and not -(2**63) <= one < 2**64:
                invalid(path, f"holds {shown(one)}, which has more than 64 bits")
            if count + len(deeper) > _MAX_VALUES:
                invalid(path, f"holds more than {_MAX_VALUES} values")
        count += len(deeper)
        layer = [one for one in deeper if not isinstance(one, str)]
        if not layer:
            return
    invalid(path, f"is nested more than {_MAX_DEPTH} deep")


def ignored_header(*bodies: Fields, strict: bool) -> dict[str, str]:
    """The response header that names fields nobody read: percent-encoded, at most 20 names and 256 bytes.

    strict: refuse the request instead, with INVALID.
    """
    names = [name for body in bodies for name in body.ignored()]
    if strict and names:
        invalid(quote(names[0])[:80], "is no field this server knows; correct its name, or leave it out")
    header = ""
    for name in names[:_IGNORED_HEADER_NAMES]:
        longer = f"{header}, {quote(name)}" if header else quote(name)
        if len(longer) > _IGNORED_HEADER_BYTES:
            break
        header = longer
    return {"x-tgi-ignored-fields": header} if header else {}
