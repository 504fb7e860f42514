"""What every handler can reach: the typed entries of the application."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final, Protocol

from aiohttp import web

from tgi_server.config import ServerConfig
from tgi_server.engine.request import EngineStatus, GenerationRequest, TokenEvent
from tgi_server.errors import Flavour
from tgi_server.http.metrics import Metrics, Turn
from tgi_server.http.spans import Tracer
from tgi_server.http.threads import Threads
from tgi_server.text.renderer import Renderer
from tgi_server.text.text import Text


class Engine(Protocol):
    """What a front end asks of an engine."""

    @property
    def status(self) -> EngineStatus:
        """The last status the engine sent."""

    @property
    def alive(self) -> bool:
        """Whether the engine's process runs."""

    def heartbeat_age_s(self) -> float:
        """Seconds since the engine was last heard of."""

    def submit(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Generate; closing the generator cancels.

        Raises UserError: OVERLOADED, GENERATION, or UNAVAILABLE when the engine is not ready or dies.
        """


@dataclass(frozen=True)
class Patience:
    """How long a client or a stream may be silent before something is done about it, in seconds."""

    headers_s: float = 10.0  # headers wait this long for the first token, so that an error gets its status
    keep_alive_s: float = 15.0  # then a comment is sent, so that proxies keep the connection
    stalled_s: float = 30.0  # a reader that takes next to nothing for this long is cut off
    head_s: float = 10.0  # from the first byte of a request to its last header
    body_s: float = 10.0  # how far a body may fall behind 1000 bytes a second


@dataclass
class Life:
    """Whether the service is about to end: then running requests finish, and no new ones are taken."""

    draining: bool = False


REQUEST_ID: Final = web.RequestKey("request_id", str)
TURN: Final = web.RequestKey("turn", Turn)
TENANT: Final = web.RequestKey("tenant", str)  # whose key it bears; absent on a server without keys
FLAVOUR: Final = web.RequestKey("flavour", Flavour)  # set by handlers of routes that speak several
CONFIG: Final = web.AppKey("config", ServerConfig)
ENGINE: Final = web.AppKey("engine", Engine)
TEXT: Final = web.AppKey("text", Text)
PATIENCE: Final = web.AppKey("patience", Patience)
METRICS: Final = web.AppKey("metrics", Metrics)
RENDERER: Final = web.AppKey("renderer", Renderer)
THREADS: Final = web.AppKey("threads", Threads)
TRACER: Final = web.AppKey("tracer", Tracer)  # only if traces are asked for
LIFE: Final = web.AppKey("life", Life)
VERSION: Final = web.AppKey("version", str)
HONOURED: Final = web.AppKey("honoured", frozenset[str])
