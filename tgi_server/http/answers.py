"""JSON answers and errors, in each flavour's shape."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from tgi_server.errors import ErrorKind, Flavour, UserError, body_of, status_of

_RETRY_AFTER_S = {ErrorKind.OVERLOADED: "1", ErrorKind.WAITED: "5", ErrorKind.UNAVAILABLE: "5"}

encode_json = msgspec.json.Encoder().encode


def json_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=encode_json(body),
        status=status,
        headers=headers,
        content_type="application/json",
        charset="utf-8",
    )


def error_response(error: UserError, flavour: Flavour) -> web.Response:
    headers = {}
    if error.kind in _RETRY_AFTER_S:
        headers["Retry-After"] = _RETRY_AFTER_S[error.kind]
    if error.kind is ErrorKind.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body_of(error, flavour), status=status_of(error.kind, flavour), headers=headers)


def error_event(error: UserError, flavour: Flavour) -> bytes:
    """The server-sent event that tells of an error once the status is out."""
    return sse_event(body_of(error, flavour))


def sse_event(body: object) -> bytes:
    """`body` as one server-sent event."""
    return b"data: " + encode_json(body) + b"\n\n"


def flavour_of(path: str) -> Flavour:
    return Flavour.OPENAI if path.startswith("/v1/") else Flavour.TGI
