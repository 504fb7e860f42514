"""The front end's end of the engine's socket. Knows no torch."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from tgi_server.engine.channel import HEADER, frame
from tgi_server.engine.request import (
    Cancel,
    EngineStatus,
    FinishReason,
    FromEngine,
    GenerationRequest,
    StepEvents,
    ToEngine,
    TokenEvent,
)
from tgi_server.errors import ErrorKind, UserError

_FAILURES: Final = {
    FinishReason.REJECTED: ErrorKind.OVERLOADED,
    FinishReason.WAITED: ErrorKind.WAITED,
    FinishReason.EXHAUSTED: ErrorKind.UNAVAILABLE,
    FinishReason.FAILED: ErrorKind.GENERATION,
}


class EngineClient:
    """Submits requests and routes each its events. Make it with `connect`, from the event loop it will live in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._outgoing = bytearray()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._inboxes: dict[str, asyncio.Queue[TokenEvent | UserError]] = {}
        self._status = EngineStatus(phase="starting")
        self._heard_at = time.monotonic()
        self._changed = asyncio.Event()
        self._alive = True
        self._task = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, sock: socket.socket) -> EngineClient:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer)

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def ready(self) -> bool:
        return self._alive and self._status.phase == "ready"

    def heartbeat_age_s(self) -> float:
        """Seconds since the engine last said anything; it does so at least twice a second once it is ready."""
        return time.monotonic() - self._heard_at

    async def wait_ready(self) -> bool:
        """Wait until the engine serves; False if it ended first (`status.detail` may say why)."""
        while self._alive and not self.ready:
            self._changed.clear()
            await self._changed.wait()
        return self.ready

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Generate; the last event has `finish` set. Closing the generator early cancels the request.

        Raises UserError: UNAVAILABLE if the engine is not ready, ends or lacks memory, OVERLOADED if it refuses the
        request, WAITED if it did not begin it in time, GENERATION if computing it failed.
        """
        self._require_ready()
        inbox: asyncio.Queue[TokenEvent | UserError] = asyncio.Queue()
        self._inboxes[request.id] = inbox
        finished = False
        try:
            self._send(request)
            while not finished:
                event = await inbox.get()
                if isinstance(event, UserError):
                    finished = True
                    raise event
                finished = event.finish is not None
                _raise_failure(event)
                yield event
        finally:
            del self._inboxes[request.id]
            if not finished and self._alive:
                self._send(Cancel(request.id))

    def mark_dead(self, detail: str) -> None:
        """The process was seen to end: every request in flight learns of it now."""
        if not self._alive:
            return
        self._alive = False
        if self._status.phase != "failed":
            self._status = EngineStatus(phase="dead", detail=detail)
        for inbox in self._inboxes.values():
            inbox.put_nowait(_gone())
        self._changed.set()

    async def close(self) -> None:
        """Hang up; the engine process ends by itself."""
        self._alive = False
        self._task.cancel()
        self._writer.close()
        await asyncio.gather(self._task, return_exceptions=True)

    def _require_ready(self) -> None:
        if self.ready:
            return
        if not self._alive:
            raise _gone()
        raise UserError(
            ErrorKind.UNAVAILABLE,
            f"the engine is {self._status.phase}, not ready yet; try again in some seconds",
        )

    def _send(self, message: ToEngine) -> None:
        """What is sent within one turn of the event loop goes out in one write, which costs as much as for one."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += frame(self._encoder.encode(message))

    def _flush(self) -> None:
        if not self._writer.is_closing():
            self._writer.write(bytes(self._outgoing))
        self._outgoing.clear()

    async def _listen(self) -> None:
        try:
            while True:
                (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                self._route(self._decoder.decode(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            self.mark_dead("the engine closed its socket")

    def _route(self, message: FromEngine) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, StepEvents):
            for event in message.events:
                inbox = self._inboxes.get(event.id)
                if inbox is not None:  # else cancelled, and the engine did not know yet
                    inbox.put_nowait(event)
            return
        self._status = message
        self._changed.set()


def _gone() -> UserError:
    return UserError(ErrorKind.UNAVAILABLE, "the engine process has ended; this request cannot be completed")


def _raise_failure(event: TokenEvent) -> None:
    kind = _FAILURES.get(event.finish) if event.finish else None
    if kind is not None:
        raise UserError(kind, event.error)
