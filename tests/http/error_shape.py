"""The shape of an error's body, by the flavour of its path."""

from __future__ import annotations

from typing import Any


def check_shape(path: str, error: Any) -> str:
    """The message, if the body has the shape of the path's flavour."""
    if path.startswith("/v1/"):
        assert set(error) == {"error"}
        assert set(error["error"]) == {"message", "type", "param", "code"}
        return str(error["error"]["message"])
    assert set(error) == {"error", "error_type"}
    return str(error["error"])
