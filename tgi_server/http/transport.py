"""The connection below the application: limits on what clients may send, and clients that hang up halfway."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, InvalidURLError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from tgi_server.http.answers import encode_json, json_response
from tgi_server.http.state import PATIENCE, REQUEST_ID, Patience

_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 8190
_MAX_FIELD_BYTES = 16384  # not the same as a line's, so that an error tells which it was
_MAX_HEADERS = 100
_IDLE_S = 75.0  # for the next request to begin; load balancers keep theirs for 60 s
_MAX_HALF_BYTES = 65_536  # of headers that are not complete yet: many such clients must not fill the memory
_SLOWEST_READER = 1000  # bytes/s; who takes less while an answer waits is cut off
_LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client can read the answer

_COMMENT = b":\n\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # the one announcement that every client skips
_PROBES_AFTER_S = (0.01, 0.02, 0.1, 1.0)  # the first also lets a request that came with the end get started


def make_runner(app: web.Application) -> web.AppRunner:
    """Runs the application so that a client that leaves cancels its request."""
    return _Runner(
        app,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,  # the guard refuses compressed bodies: a small one may hold gigabytes
        keepalive_timeout=_IDLE_S,
        lingering_time=_LINGER_S,
        max_line_size=_MAX_LINE_BYTES,
        max_field_size=_MAX_FIELD_BYTES,
        max_headers=_MAX_HEADERS,
    )


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            self.app[PATIENCE],
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,
        )


class _Server(web.Server):
    def __init__(self, patience: Patience, handler: _Handler, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self.patience = patience

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    """Answers malformed requests in JSON, and those whose client has shut down its sending side.

    A client that closed its connection looks just like one that only has nothing more to say, until something
    is written to it: then the first answers with a reset. So something harmless is written.
    """

    _probing: asyncio.Task[None] | None = None
    _half_bytes = 0  # of a request whose headers are not complete
    _half_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None  # runs while the client is behind in reading

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self._waiter is not None and not self._waiter.done()
        if not waiting and self._request_count:  # a request is whole, or being answered
            self._forget_half()
            return
        self._half_bytes += len(data)
        if self._half_timer is None and isinstance(self._manager, _Server):
            head_s = self._manager.patience.head_s
            why = f"the request's headers were not complete after {head_s:g} s"
            self._half_timer = self._loop.call_later(head_s, self._give_up, 408, "Request Timeout", why)
        if self._half_bytes > _MAX_HALF_BYTES:
            why = f"the request's headers have more than {_MAX_HALF_BYTES} bytes, the most allowed"
            self._give_up(431, "Request Header Fields Too Large", why)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

    def _watch_reader(self) -> None:
        if self.transport is not None and isinstance(self._manager, _Server):
            stalled_s = self._manager.patience.stalled_s
            waiting = _unread_bytes(self.transport)
            self._reader_timer = self._loop.call_later(stalled_s, self._check_reader, waiting, stalled_s)

    def _check_reader(self, waiting: int, stalled_s: float) -> None:
        """Cut off a reader that leaves `waiting` bytes where they are: many such would fill the memory."""
        if self.transport is None:
            return
        taken = waiting - _unread_bytes(self.transport)
        if taken >= _SLOWEST_READER * stalled_s:
            self._watch_reader()
            return
        asked = self._current_request
        log.warning(
            "request %s: the client stopped reading, it took %d bytes in %g s; its connection is closed",
            "(answered)" if asked is None else asked.get(REQUEST_ID), taken, stalled_s,
        )  # fmt: skip
        self.transport.abort()

    def _forget_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self._forget_half()
        self._forget_reader()
        super().connection_lost(exc)

    def _forget_half(self) -> None:
        self._half_bytes = 0
        if self._half_timer is not None:
            self._half_timer.cancel()
            self._half_timer = None

    def _give_up(self, status: int, phrase: str, why: str) -> None:
        """Answer half a request: there is no request object yet that an application could answer."""
        self._forget_half()
        if self.transport is None:
            return
        log.info("malformed request: %d %s", status, why)
        body = encode_json({"error": why, "error_type": "timeout" if status == 408 else "validation"})
        head = (
            f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.force_close()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio keeps the transport if it is true
        idle = self._waiter is not None and not self._waiter.done()
        if idle or self.ssl_context is not None:  # TLS has no half-closed connections
            return None
        self._probing = asyncio.create_task(self._probe())
        return True

    async def _probe(self) -> None:
        """Keep an answer going as long as there may be somebody to read it."""
        await asyncio.sleep(_PROBES_AFTER_S[0])
        request = self._current_request
        if request is None or not request.content.is_eof() or request.version < HttpVersion11:
            self.force_close()
            return
        if not self._messages:
            self.close()  # after this answer
        for pause_s in _PROBES_AFTER_S:
            if self.transport is None or self._current_request is not request:
                return
            if request.writer.output_size == 0:
                self.transport.write(_CONTINUE)
            else:  # only event streams write before their handler returns
                with suppress(ConnectionError):
                    await request.writer.write(_COMMENT)
            await asyncio.sleep(pause_s)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What the parser refuses is the client's fault: an answer, one line in the log, no traceback."""
        if not isinstance(exc, BadHttpMessage):
            return super().handle_error(request, status, exc, message)
        status, reason = _verdict(exc)
        log.info("malformed request: %d %s", status, reason)
        response = json_response({"error": reason, "error_type": "validation"}, status=status)
        response.force_close()
        return response


def _unread_bytes(transport: asyncio.Transport) -> int:
    """What was written and the client's machine has not taken, here and in the kernel, whose buffer is megabytes."""
    sock = transport.get_extra_info("socket")
    queued = b"" if sock is None else ioctl(sock.fileno(), TIOCOUTQ, bytes(4))
    return transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)


def _verdict(error: BadHttpMessage) -> tuple[int, str]:
    if isinstance(error, LineTooLong):
        if _MAX_LINE_BYTES in error.args:
            return 414, f"the request's address has more than {_MAX_LINE_BYTES} bytes, the most allowed"
        return 431, f"a header has more than {_MAX_FIELD_BYTES} bytes, the most allowed"
    if error.message.startswith("Too many headers"):
        return 431, f"there are more than {_MAX_HEADERS} headers, the most allowed"
    return 400, f"this is not a valid HTTP request: {_fault(error)}"


def _fault(error: BadHttpMessage) -> str:
    """The parser's words, without the bytes of the client's that it quotes below them."""
    if isinstance(error, InvalidURLError):  # nothing but the address
        return "Invalid address"
    return error.message.partition(":\n\n")[0].splitlines()[-1].strip()[:100]
