"""Which web pages may call this server (CORS). Credentials of a browser are never asked for."""

from __future__ import annotations

import re
from collections.abc import Collection

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tgi_server.http.state import CONFIG

_HEADERS = re.compile(r"[A-Za-z0-9_, -]{1,2000}")
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Max-Age": "600",
}


def answer_preflights(origins: Collection[str]) -> Middleware:
    """Answers a browser's question whether a page may call; it carries no key."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if asks and _allowed(request, origins):
            return web.Response(
                status=204, headers={**_PREFLIGHT, "Access-Control-Allow-Headers": _headers(request)}
            )
        return await handler(request)

    return answer


async def name_origin(request: web.Request, response: web.StreamResponse) -> None:
    """A signal handler for just before headers go out."""
    origins = request.app[CONFIG].cors_allow_origin
    if origins and "*" not in origins:
        response.headers["Vary"] = "Origin"
    if (allowed := _allowed(request, origins)) is not None:
        response.headers["Access-Control-Allow-Origin"] = allowed
        response.headers["Access-Control-Expose-Headers"] = "*"


def _headers(request: web.Request) -> str:
    """Those the page asks for: they give it no rights, and SDKs send a dozen of their own."""
    asked = request.headers.get("Access-Control-Request-Headers", "")
    return asked if _HEADERS.fullmatch(asked) else "authorization, content-type, x-request-id"


def _allowed(request: web.Request, origins: Collection[str]) -> str | None:
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    if "*" in origins:
        return "*"
    return origin if origin in origins else None
