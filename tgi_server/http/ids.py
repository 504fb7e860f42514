"""Names for requests and answers."""

from __future__ import annotations

from random import getrandbits


def new_id() -> str:
    """32 hexadecimal digits that nothing else has. Not a secret: uuid4 asks the kernel for each, 7 µs."""
    return f"{getrandbits(128):032x}"
