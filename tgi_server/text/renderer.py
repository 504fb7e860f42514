"""Chat templates rendered in a process that may be killed, so that none can stop the event loop."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from tgi_server.errors import ErrorKind, UserError
from tgi_server.text.render_worker import HEADER, Job, Rendered, Setup
from tgi_server.text.template import ChatTemplate

_START_S = 10.0  # for an interpreter and its imports on a busy machine

Message = Mapping[str, object]


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use."""

    time_s: float = 2.0
    output_chars: int = 4 << 20
    memory_bytes: int = 512 << 20  # of the whole worker


class Renderer:
    """One worker process, started when first needed and again whenever it has died; one prompt at a time."""

    def __init__(self, template: ChatTemplate, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._setup = Setup(
            dict(template.sources),
            dict(template.special_tokens),
            self._limits.time_s,
            self._limits.output_chars,
            self._limits.memory_bytes,
        )
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Message | None = None,
    ) -> str:
        """As `ChatTemplate.render`. Raises UserError (TEMPLATE), also when a limit is passed."""
        job = Job(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            extra=dict(extra or {}),
        )
        # A client that leaves must not leave a half-read answer in the pipe: the exchange goes on without it.
        answer = await asyncio.shield(asyncio.ensure_future(self._exchange(msgspec.msgpack.encode(job))))
        if answer.error:
            raise UserError(ErrorKind.TEMPLATE, answer.error, answer.field)
        return answer.prompt

    async def start(self) -> None:
        """Have a worker ready before the first request."""
        async with self._turn:
            await self._worker()

    async def close(self) -> None:
        async with self._turn:
            await self._end()

    async def _exchange(self, job: bytes) -> Rendered:
        async with self._turn:
            for _ in range(2):  # a worker that died while idle, by whatever hand, is replaced once
                try:
                    process = await self._worker()
                    # The worker's own alarm comes first; this is for one that is stopped.
                    return await asyncio.wait_for(_ask(process, job), 2 * self._limits.time_s)
                except asyncio.TimeoutError:
                    await self._end()
                    return self._too_slow()
                except (ConnectionError, asyncio.IncompleteReadError):
                    if await self._end(patience_s=1.0) == -signal.SIGALRM:
                        return self._too_slow()
        return Rendered(error="the model's chat template ended its renderer", field="messages")

    def _too_slow(self) -> Rendered:
        limit_s = self._limits.time_s
        return Rendered(
            error=f"the model's chat template took longer than {limit_s:g} s for these messages",
            field="messages",
        )

    async def _worker(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tgi_server.text.render_worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is the front end's to handle
            )
            await asyncio.wait_for(_ask(self._process, msgspec.msgpack.encode(self._setup)), _START_S)
        return self._process

    async def _end(self, patience_s: float = 0.0) -> int:
        """Make sure that there is no worker; the status of the one there was.

        patience_s: for one that is ending by itself. Killing it would reap it, and lose what it died of.
        """
        process, self._process = self._process, None
        if process is None:
            return 0
        if patience_s:
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(process.wait(), patience_s)
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        return await process.wait()


async def _ask(process: asyncio.subprocess.Process, frame: bytes) -> Rendered:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(HEADER.pack(len(frame)) + frame)
    await process.stdin.drain()
    (length,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
    return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=Rendered)
