"""The engine's end of its socket: length-prefixed msgpack frames, never blocking the step loop."""

from __future__ import annotations

import select
import socket
import struct
from typing import Final

import msgspec

from tgi_server.config import EngineConfig
from tgi_server.engine.request import FromEngine, ToEngine

HEADER: Final = struct.Struct("<I")
MAX_FRAME_BYTES: Final = 256 << 20  # far above any request; a longer length means a broken stream


class PeerGone(Exception):
    """The other process closed the socket or died."""


def frame(payload: bytes) -> bytes:
    return HEADER.pack(len(payload)) + payload


def encode_config(config: EngineConfig) -> bytes:
    return frame(msgspec.msgpack.encode(config, enc_hook=str))


class Channel:
    """Reads requests and writes events; what the kernel will not take now is kept and sent later."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        # One for good: a new one for each read tears the heap, which then grows by 100 bytes a request.
        self._buffer = bytearray(1 << 20)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def receive_config(self) -> EngineConfig:
        """The first frame, sent by whoever started this process."""
        while True:
            frames = self._frames(timeout_s=None)
            if frames:
                return msgspec.msgpack.decode(
                    frames[0], type=EngineConfig, dec_hook=lambda kind, value: kind(value)
                )

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Messages that have arrived, waiting up to `timeout_s` for the first. Raises PeerGone."""
        return [self._decoder.decode(payload) for payload in self._frames(timeout_s)]

    def send(self, message: FromEngine) -> None:
        """Queue a message and write what fits. Raises PeerGone, also if the other side has long stopped reading."""
        if len(self._outgoing) > MAX_FRAME_BYTES:
            raise PeerGone(f"{len(self._outgoing)} bytes wait for a front end that does not read")
        self._outgoing += frame(self._encoder.encode(message))
        self._flush()

    def _frames(self, timeout_s: float | None) -> list[bytes]:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poller.poll(None if timeout_s is None else timeout_s * 1000)
        self._flush()
        self._fill()
        return self._split()

    def _fill(self) -> None:
        while True:
            try:
                count = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerGone from error
            if not count:
                raise PeerGone
            self._incoming += memoryview(self._buffer)[:count]

    def _split(self) -> list[bytes]:
        payloads = []
        at = 0
        while len(self._incoming) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._incoming, at)
            if length > MAX_FRAME_BYTES:
                raise PeerGone(f"a frame of {length} bytes was announced; the stream is broken")
            end = at + HEADER.size + length
            if len(self._incoming) < end:
                break
            payloads.append(bytes(self._incoming[at + HEADER.size : end]))
            at = end
        del self._incoming[:at]
        return payloads

    def _flush(self) -> None:
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing)
                del self._outgoing[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerGone from error
