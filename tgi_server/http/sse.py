"""Server-sent events whose status is still honest: headers wait for the first token or the first error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from aiohttp import web

from tgi_server.errors import ErrorKind, Flavour, UserError
from tgi_server.http.answers import error_event
from tgi_server.http.state import PATIENCE, REQUEST_ID, TURN, Patience

log = logging.getLogger(__name__)

_COMMENT = b":\n\n"


async def stream_events(
    request: web.Request,
    events: AsyncGenerator[bytes, None],
    flavour: Flavour,
    headers: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    """Answer with `events`, each a whole server-sent event.

    An error before the first event is raised and becomes a proper status; a later one is sent as an event of
    the flavour's shape, and the stream ends.
    """
    stream = _Stream(request, headers or {}, request.app[PATIENCE])
    watcher = asyncio.create_task(stream.watch())
    try:
        async with aclosing(events):
            async for event in events:
                await stream.send(event)
    except ConnectionError:
        stream.lost = True
        request[TURN].dropped = True
    except Exception as error:
        if not await stream.is_open():
            raise
        failure = _as_user_error(error, request)
        request[TURN].error = failure.kind
        await stream.send(error_event(failure, flavour))
    finally:
        watcher.cancel()
    return await stream.close()


def _as_user_error(error: Exception, request: web.Request) -> UserError:
    if isinstance(error, UserError):
        return error
    log.error("request %s failed in its stream", request[REQUEST_ID], exc_info=error)
    return UserError(
        ErrorKind.INTERNAL, f"internal error; the server's log has it under {request[REQUEST_ID]}"
    )


class _Stream:
    """The response and a watch over its silences."""

    def __init__(self, request: web.Request, headers: Mapping[str, str], patience: Patience) -> None:
        self.opened = False  # whether the headers are out
        self.lost = False
        self._request = request
        self._patience = patience
        self._opening = asyncio.Lock()
        self._wrote_at = time.monotonic()
        self._writing = False
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx collects a stream otherwise
                **headers,
            }
        )

    async def send(self, data: bytes) -> None:
        if not self.opened:
            await self._open()
        self._writing = True
        await self._response.write(data)
        self._writing = False
        self._wrote_at = time.monotonic()

    async def is_open(self) -> bool:
        """Whether the status is out, or just on its way."""
        async with self._opening:
            return self.opened

    async def close(self) -> web.StreamResponse:
        if self.lost:
            return self._response
        if not self.opened:
            await self._open()
        await self._response.write_eof()
        return self._response

    async def watch(self) -> None:
        """Send headers after a while, and comments in silences."""
        await asyncio.sleep(self._patience.headers_s)
        if not self.opened:
            await self._open()
        while True:
            quiet_s = time.monotonic() - self._wrote_at
            if self._writing:  # to a reader that is behind: no silence
                quiet_s = 0.0
            elif quiet_s >= self._patience.keep_alive_s:
                await self.send(_COMMENT)
                quiet_s = 0.0
            await asyncio.sleep(max(self._patience.keep_alive_s - quiet_s, 0.01))

    async def _open(self) -> None:
        async with self._opening:
            if not self.opened:
                await self._response.prepare(self._request)
                self.opened = True
