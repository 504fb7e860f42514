"""What every handler can reach: the typed entries of the application."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final, Protocol

from aiohttp import web

from tgi_server.config import ServerConfig
from tgi_server.engine.request import EngineStatus, GenerationRequest, TokenEvent
from tgi_server.errors import Flavour
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
    """How long a stream may be silent before something is done about it, in seconds."""

    headers_s: float = 10.0  # headers wait this long for the first token, so that an error gets its status
    keep_alive_s: float = 15.0  # then a comment is sent, so that proxies keep the connection
    stalled_s: float = 60.0  # a reader that takes nothing for this long is cut off
    body_s: float = 10.0  # a body may take this long, and a second more for every 1000 bytes


REQUEST_ID: Final = web.RequestKey("request_id", str)
FLAVOUR: Final = web.RequestKey("flavour", Flavour)  # set by handlers of routes that speak several
CONFIG: Final = web.AppKey("config", ServerConfig)
ENGINE: Final = web.AppKey("engine", Engine)
TEXT: Final = web.AppKey("text", Text)
PATIENCE: Final = web.AppKey("patience", Patience)
VERSION: Final = web.AppKey("version", str)
HONOURED: Final = web.AppKey("honoured", frozenset[str])
