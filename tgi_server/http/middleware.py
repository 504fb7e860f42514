"""Around every request: an id, one line in the log, and errors in the flavour's shape."""

from __future__ import annotations

import asyncio
import logging
import re
import time

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.typedefs import Handler

from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.answers import error_response, flavour_of
from tgi_server.http.ids import new_id
from tgi_server.http.metrics import GENERATING, Turn
from tgi_server.http.spans import Spoken
from tgi_server.http.state import CONFIG, FLAVOUR, LIFE, METRICS, REQUEST_ID, TRACER, TURN

log = logging.getLogger(__name__)

# What a client's id may be, so that it can be echoed and logged as it is.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    app = request.app
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else new_id()
    counted = request.method == "POST" and request.path in GENERATING
    turn = request[TURN] = Turn(app[METRICS], counted=counted)
    status = 0
    try:
        if counted and app[LIFE].draining:
            response: web.StreamResponse = _refuse(request, _stopping())
        else:
            response = await _answer(request, handler)
        status = response.status
        return response
    except asyncio.CancelledError:
        turn.dropped = True
        raise
    finally:
        turn.end()
        _log(request, turn, status)
        if counted and TRACER in app:
            app[TRACER].record(_spoken(request, turn, status))


def _stopping() -> UserError:
    return UserError(ErrorKind.UNAVAILABLE, "the server is stopping and takes no new requests; try another")


def _log(request: web.Request, turn: Turn, status: int) -> None:
    """One line a request; never a word of its prompt."""
    outcome = "cancelled" if turn.dropped else str(status)
    if turn.error is not None and status == 200:
        outcome += f" then {turn.error.value}"
    tokens = ""
    if turn.prompt_tokens:
        first = "none" if turn.first_token_s is None else f"{turn.first_token_s * 1e3:.1f} ms"
        tokens = f" prompt={turn.prompt_tokens} generated={turn.generated_tokens} first={first}"
    log.info(
        "%s %s %s %.1f ms%s id=%s",
        _printable(request.method),
        _printable(request.path),
        outcome,
        (time.monotonic() - turn.began_s) * 1e3,
        tokens,
        request[REQUEST_ID],
    )


def _spoken(request: web.Request, turn: Turn, status: int) -> Spoken:
    """What a trace may say of the request."""
    first = turn.first_token_s
    return Spoken(
        method=request.method,
        route=request.path,
        status=status,
        request_id=request[REQUEST_ID],
        model=request.app[CONFIG].model_id,
        headers=request.headers,
        began_s=turn.began_s,
        ended_s=time.monotonic(),
        submitted_s=turn.submitted_s,
        queued_s=turn.queued_s,
        first_token_s=None if first is None else turn.began_s + first,
        prompt_tokens=turn.prompt_tokens,
        generated_tokens=turn.generated_tokens,
        failure="dropped" if turn.dropped else turn.error.value if turn.error else "",
    )


async def echo_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """A signal handler for just before headers go out."""
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
    response.headers["Server"] = "tgi-server"


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        _check_head(request)
        return await handler(request)
    except UserError as error:
        return _refuse(request, error)
    except web.HTTPException as error:
        return _from_http_exception(error, request)
    except ConnectionError:
        request[TURN].dropped = True
        message = "the connection broke before the whole body had arrived"
        return _refuse(request, UserError(ErrorKind.UNPARSABLE, message))
    except Exception:
        log.exception("request %s failed", request[REQUEST_ID])
        message = f"internal error; the server's log has it under {request[REQUEST_ID]}"
        return _refuse(request, UserError(ErrorKind.INTERNAL, message))


def _refuse(request: web.Request, error: UserError) -> web.Response:
    """The error in the shape the client of this route parses."""
    request[TURN].error = error.kind
    return error_response(error, request.get(FLAVOUR) or flavour_of(request.path))


def _check_head(request: web.Request) -> None:
    """Refuse a version that is not spoken here, and, before reading it, a body that is compressed or too long."""
    if request.version not in (HttpVersion10, HttpVersion11):
        major, minor = request.version
        message = f"this is HTTP/{major}.{minor}; the server speaks HTTP/1.1 and 1.0"
        raise UserError(ErrorKind.UNPARSABLE, message)
    for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        encoding = ", ".join(request.headers.getall(header, [])) or plain
        if encoding.lower() != plain:
            message = f"the body is encoded as {_printable(encoding)}; send it as it is"
            raise UserError(ErrorKind.ENCODED, message)
    limit = request.app[CONFIG].payload_limit_bytes
    length = request.content_length
    if length is not None and length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=length)


def _from_http_exception(error: web.HTTPException, request: web.Request) -> web.Response:
    """What aiohttp raises for routes and bodies, as JSON."""
    path = _printable(request.path)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{path} does not answer {_printable(request.method)}; use {allowed}"
        response = _refuse(request, UserError(ErrorKind.METHOD_NOT_ALLOWED, message))
        response.headers["Allow"] = allowed
        return response
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.app[CONFIG].payload_limit_bytes
        message = f"the body has more than {limit} bytes, the most allowed"
        response = _refuse(request, UserError(ErrorKind.TOO_LARGE, message))
        response.force_close()  # the rest of the body is not worth reading
        return response
    kind = ErrorKind.NOT_FOUND if error.status == 404 else ErrorKind.UNPARSABLE
    message = f"there is no {path}" if error.status == 404 else error.reason
    return _refuse(request, UserError(kind, message))


def _printable(text: str) -> str:
    """Text of a client's, short and without control characters, fit for logs and messages."""
    text = text[:200]
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)
