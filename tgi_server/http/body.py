"""Reading a request's body, from clients of any speed."""

from __future__ import annotations

import asyncio
import time

from aiohttp import HttpVersion11, web

from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.schema import Fields, parse_object
from tgi_server.http.state import CONFIG, PATIENCE

_SLOWEST_BYTES_PER_S = 1000


async def read_fields(request: web.Request) -> Fields:
    """The JSON object of the body. Raises UserError: UNPARSABLE, TOO_LARGE, or TIMEOUT for a drip."""
    return Fields(parse_object(await _read_body(request)))


async def wait_for_invitation(request: web.Request) -> None:
    """What a route does with `Expect: 100-continue`: nothing yet, for the request may be refused unread."""


async def _read_body(request: web.Request) -> bytes:
    if request.content.is_eof():  # it came with the headers, as short ones do
        return await request.read()
    _invite(request)
    limit = request.app[CONFIG].payload_limit_bytes
    patience_s = request.app[PATIENCE].body_s
    began_s = now_s = time.monotonic()
    deadline_s = began_s + patience_s
    body = bytearray()
    while not request.content.at_eof():
        try:
            data = await asyncio.wait_for(request.content.readany(), max(deadline_s - now_s, 0.0))
        except asyncio.TimeoutError:
            taken_s = time.monotonic() - began_s
            raise UserError(
                ErrorKind.TIMEOUT,
                f"only {len(body)} bytes of the body came in {taken_s:.0f} s; send it faster",
            ) from None
        body += data
        now_s = time.monotonic()
        # What came fast buys no long silence: who holds much of a body would hold its memory, too.
        deadline_s = min(deadline_s + len(data) / _SLOWEST_BYTES_PER_S, now_s + patience_s)
        if len(body) > limit:
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(body))
    return bytes(body)


def _invite(request: web.Request) -> None:
    """Tell a client to send its body, if it waits for that."""
    waits = request.headers.get("Expect", "").lower() == "100-continue"
    if waits and request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
