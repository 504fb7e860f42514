"""Who may call what."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from enum import IntEnum
from hashlib import sha256
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.state import TENANT


class Access(IntEnum):
    """What a route needs; a key is good for its own level and those below."""

    OPEN = 0
    USER = 1
    ADMIN = 2


# Every route, as (method, path). One that is missing here is for administrators only.
ACCESS: Final[Mapping[tuple[str, str], Access]] = {
    ("GET", "/"): Access.OPEN,
    ("GET", "/health"): Access.OPEN,
    ("GET", "/livez"): Access.OPEN,
    ("GET", "/ping"): Access.OPEN,
    ("GET", "/readyz"): Access.OPEN,
    ("GET", "/api-doc/openapi.json"): Access.USER,
    ("GET", "/docs"): Access.USER,
    ("GET", "/info"): Access.USER,
    ("GET", "/openapi.json"): Access.USER,
    ("GET", "/metrics"): Access.USER,  # open on --prometheus-port
    ("GET", "/v1/models"): Access.USER,
    ("GET", "/v1/models/{model}"): Access.USER,
    ("POST", "/"): Access.USER,
    ("POST", "/chat_tokenize"): Access.USER,
    ("POST", "/detokenize"): Access.USER,
    ("POST", "/generate"): Access.USER,
    ("POST", "/generate_stream"): Access.USER,
    ("POST", "/invocations"): Access.USER,
    ("POST", "/tokenize"): Access.USER,
    ("POST", "/v1/chat/completions"): Access.USER,
    ("POST", "/v1/completions"): Access.USER,
    ("POST", "/vertex"): Access.USER,
}


class Keys:
    """The keys there are, as digests: comparing those takes the same time for every wrong key."""

    def __init__(self, user: Sequence[str], admin: Sequence[str]) -> None:
        self._digests = [(Access.USER, _digest(key)) for key in user]
        self._digests += [(Access.ADMIN, _digest(key)) for key in admin]

    @property
    def needed(self) -> bool:
        return bool(self._digests)

    def tenant(self, key: str) -> str:
        """A name for whoever has `key` that does not give it away."""
        return _digest(key).hex()

    def access(self, key: str) -> Access:
        """What `key` is good for; OPEN if it is none of ours."""
        digest = _digest(key)
        # Every key is compared, so that the time does not tell which one was close.
        found = [level for level, known in self._digests if hmac.compare_digest(digest, known)]
        return max(found, default=Access.OPEN)


def check_key(keys: Keys, access: Mapping[tuple[str, str], Access] = ACCESS) -> Middleware:
    """A middleware that lets nobody pass without a key good enough for the route.

    It looks at the route that was matched and not at the path, which a client can spell in many ways.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if keys.needed:
            request[TENANT] = _require(keys, _needed(request, access), request)
        return await handler(request)

    return check


def _needed(request: web.Request, access: Mapping[tuple[str, str], Access]) -> Access:
    resource = request.match_info.route.resource
    if resource is None:  # no such route: that, too, is only for those with a key
        return Access.USER
    method = "GET" if request.method == "HEAD" else request.method
    return access.get((method, resource.canonical), Access.ADMIN)


def _require(keys: Keys, needed: Access, request: web.Request) -> str:
    """The tenant whose key the request bears; empty for a route that is open to all."""
    if needed is Access.OPEN:
        return ""
    sent = request.headers.getall("Authorization", [])
    scheme, _, key = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
    granted = keys.access(key.strip()) if scheme.lower() == "bearer" else Access.OPEN
    if granted is Access.OPEN:
        raise UserError(ErrorKind.UNAUTHORIZED, "send a valid key as `Authorization: Bearer KEY`")
    if granted < needed:
        raise UserError(ErrorKind.FORBIDDEN, "this route needs an administrator's key")
    return keys.tenant(key.strip())


def _digest(key: str) -> bytes:
    # A header's undecodable bytes arrive as lone surrogates.
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
