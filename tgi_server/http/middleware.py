"""Around every request: an id, one line in the log, and errors in the flavour's shape."""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Handler

from tgi_server.errors import ErrorKind, Flavour, UserError
from tgi_server.http.answers import error_response, flavour_of
from tgi_server.http.state import CONFIG, FLAVOUR, REQUEST_ID

log = logging.getLogger(__name__)

# What a client's id may be, so that it can be echoed and logged as it is.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
    started = time.monotonic()
    outcome = "cancelled"
    try:
        response = await _answer(request, handler)
        outcome = str(response.status)
        return response
    finally:
        log.info(
            "%s %s %s %.1f ms id=%s",
            request.method,
            _printable(request.path),
            outcome,
            (time.monotonic() - started) * 1e3,
            request[REQUEST_ID],
        )


async def echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """A signal handler for just before headers go out."""
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    flavour = flavour_of(request.path)
    try:
        _check_body(request)
        return await handler(request)
    except UserError as error:
        return error_response(error, request.get(FLAVOUR, flavour))
    except web.HTTPException as error:
        return _from_http_exception(error, request, flavour)
    except ConnectionError:
        broken = UserError(ErrorKind.UNPARSABLE, "the connection broke before the whole body had arrived")
        return error_response(broken, flavour)
    except Exception:
        log.exception("request %s failed", request[REQUEST_ID])
        failure = UserError(
            ErrorKind.INTERNAL, f"internal error; the server's log has it under {request[REQUEST_ID]}"
        )
        return error_response(failure, request.get(FLAVOUR, flavour))


def _check_body(request: web.Request) -> None:
    """Refuse a body that is compressed or too long before reading it."""
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise UserError(ErrorKind.ENCODED, f"the body is encoded as {_printable(encoding)}; send it as it is")
    limit = request.app[CONFIG].payload_limit_bytes
    length = request.content_length
    if length is not None and length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=length)


def _from_http_exception(error: web.HTTPException, request: web.Request, flavour: Flavour) -> web.Response:
    """What aiohttp raises for routes and bodies, as JSON."""
    path = _printable(request.path)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        failure = UserError(
            ErrorKind.METHOD_NOT_ALLOWED,
            f"{path} does not answer {_printable(request.method)}; use {allowed}",
        )
        response = error_response(failure, flavour)
        response.headers["Allow"] = allowed
        return response
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.app[CONFIG].payload_limit_bytes
        failure = UserError(ErrorKind.TOO_LARGE, f"the body has more than {limit} bytes, the most allowed")
        response = error_response(failure, flavour)
        response.force_close()  # the rest of the body is not worth reading
        return response
    kind = ErrorKind.NOT_FOUND if error.status == 404 else ErrorKind.UNPARSABLE
    message = f"there is no {path}" if error.status == 404 else error.reason
    return error_response(UserError(kind, message), flavour)


def _printable(text: str) -> str:
    """Text of a client's, short and without control characters, fit for logs and messages."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])
