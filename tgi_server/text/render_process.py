"""A front end's end of one render worker: many jobs on their way, answers in their order."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import cast

import msgspec

from tgi_server.text.render_worker import HEADER, Job, Rendered, Setup


class WorkerDied(Exception):
    """The worker ended before it answered. Who asks cannot know whose job it died of, unless it was the only one."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the renderer ended with status {status}")
        self.status = status  # as of a process: negative is a signal


class RenderProcess(asyncio.SubprocessProtocol):
    """One worker process. What is asked within one turn of the event loop goes out in one write."""

    _transport: asyncio.SubprocessTransport
    _input: asyncio.WriteTransport

    def __init__(self, patience_s: float) -> None:
        """patience_s: a worker that says nothing for this long is killed; its own alarm should come first."""
        self._patience_s = patience_s
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Rendered)
        self._asked: deque[asyncio.Future[Rendered]] = deque()
        self._outgoing: list[bytes] = []
        self._incoming = bytearray()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._watch: asyncio.TimerHandle | None = None
        self._heard_s = 0.0

    @classmethod
    async def start(cls, setup: Setup, patience_s: float, start_s: float) -> RenderProcess:
        """A worker that is ready. Raises WorkerDied, also if it is not after `start_s`."""
        loop = asyncio.get_running_loop()
        transport, process = await loop.subprocess_exec(
            lambda: cls(patience_s),
            sys.executable,
            "-m",
            "tgi_server.text.render_worker",
            stderr=None,
            start_new_session=True,  # Ctrl-C in the terminal is the front end's to handle
        )
        process._transport = transport
        process._input = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
        process._heard_s = loop.time() + start_s - patience_s
        await process._ask(setup)
        return process

    @property
    def alive(self) -> bool:
        return not self._ended.done()

    def ask(self, job: Job) -> asyncio.Future[Rendered]:
        """The answer to come. Fails with WorkerDied; cancelling it changes nothing for others."""
        if not self._asked:
            self._heard_s = self._loop.time()
        return self._ask(job)

    async def end(self) -> None:
        """Kill it and wait until it is gone."""
        if self.alive:
            self._transport.kill()
        await asyncio.shield(self._ended)
        self._transport.close()

    def _ask(self, message: Setup | Job) -> asyncio.Future[Rendered]:
        answer: asyncio.Future[Rendered] = self._loop.create_future()
        if not self.alive:
            answer.set_exception(WorkerDied(self._ended.result()))
            return answer
        payload = self._encoder.encode(message)
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing += (HEADER.pack(len(payload)), payload)
        self._asked.append(answer)
        if self._watch is None:
            self._look()
        return answer

    def _flush(self) -> None:
        data, self._outgoing = b"".join(self._outgoing), []
        self._input.write(data)

    def _look(self) -> None:
        """Kill a worker that has been silent for too long; look again when it could have been, if it owes answers."""
        self._watch = None
        if not self._asked or not self.alive:
            return
        left_s = self._heard_s + self._patience_s - self._loop.time()
        if left_s <= 0:
            self._transport.kill()
        else:
            self._watch = self._loop.call_later(left_s, self._look)

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002 - only its output is piped
        self._heard_s = self._loop.time()
        self._incoming += data
        at = 0
        # Last words may come after the end was noticed, when those who waited for them already ask another worker.
        while self._asked and len(self._incoming) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._incoming, at)
            begin, end = at + HEADER.size, at + HEADER.size + length
            if len(self._incoming) < end:
                break
            answer = self._asked.popleft()
            if not answer.done():  # else its client has left
                answer.set_result(self._decoder.decode(memoryview(self._incoming)[begin:end]))
            at = end
        del self._incoming[:at]

    def process_exited(self) -> None:
        status = self._transport.get_returncode()
        self._ended.set_result(-1 if status is None else status)
        if self._watch is not None:
            self._watch.cancel()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(WorkerDied(self._ended.result()))
        self._asked.clear()
