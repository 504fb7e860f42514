"""Names that a compressed-tensors config means: whole names, the class of all matrices, patterns after "re:"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from tgi_server.errors import StartupError

_PATTERN: Final = "re:"
_CLASS: Final = "Linear"


def closeness(name: str, targets: Sequence[str]) -> int:
    """How closely `targets` mean matrix `name`: 3 by its name, 2 by a pattern, 1 as a matrix; 0 not at all."""
    if name in targets:
        return 3
    if any(
        target.startswith(_PATTERN) and re.match(target.removeprefix(_PATTERN), name) for target in targets
    ):
        return 2
    return 1 if _CLASS in targets else 0


def targets_of(value: object, where: str) -> tuple[str, ...]:
    """The names in a config. Raises StartupError if it holds something else, or a pattern that is none."""
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise StartupError(f"{where} is {value!r}; a list of names is needed")
    for target in value:
        try:
            re.compile(target.removeprefix(_PATTERN) if target.startswith(_PATTERN) else "")
        except re.error as error:
            raise StartupError(f"{where}: {target!r} is no regular expression ({error})") from None
    return tuple(value)
