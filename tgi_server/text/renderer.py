"""Chat templates rendered in a process that may be killed, so that none can stop the event loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tgi_server.errors import ErrorKind, UserError
from tgi_server.text.render_process import RenderProcess, WorkerDied
from tgi_server.text.render_worker import Job, Rendered, Setup
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
    """One worker process, started when first needed and again whenever it has died.

    Jobs are sent as they come, without waiting for the answers before. When the worker dies, one of those under
    way was to blame: each is asked again with the worker to itself, and the one that ends it a second time is it.
    """

    def __init__(self, template: ChatTemplate, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._setup = Setup(
            dict(template.sources),
            dict(template.special_tokens),
            self._limits.time_s,
            self._limits.output_chars,
            self._limits.memory_bytes,
        )
        self._process: RenderProcess | None = None
        self._starting = asyncio.Lock()
        self._alone = asyncio.Lock()

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
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            extra=extra or {},
        )
        try:
            worker = await self._worker()
            answer = await (self._ask_alone(job) if self._alone.locked() else worker.ask(job))
        except WorkerDied:
            answer = await self._ask_alone(job)
        if answer.error:
            raise UserError(ErrorKind.TEMPLATE, answer.error, answer.field)
        return answer.prompt

    async def start(self) -> None:
        """Have a worker ready before the first request."""
        await self._worker()

    async def close(self) -> None:
        async with self._starting:
            if self._process is not None:
                await self._process.end()

    async def _ask_alone(self, job: Job) -> Rendered:
        """Ask while nobody else does: whatever happens to the worker now is this job's doing, or an accident's."""
        async with self._alone:
            for _ in range(2):  # an accident is forgiven once
                try:
                    return await (await self._worker()).ask(job)
                except WorkerDied as death:
                    if death.status == -signal.SIGALRM:
                        return self._too_slow()
        return Rendered(error="the model's chat template ended its renderer", field="messages")

    def _too_slow(self) -> Rendered:
        limit_s = self._limits.time_s
        return Rendered(
            error=f"the model's chat template took longer than {limit_s:g} s for these messages",
            field="messages",
        )

    async def _worker(self) -> RenderProcess:
        if self._process is not None and self._process.alive:
            return self._process
        async with self._starting:
            if self._process is None or not self._process.alive:
                if self._process is not None:
                    await self._process.end()
                # Twice the worker's own alarm: this is for one that is stopped.
                patience_s = 2 * self._limits.time_s
                self._process = await RenderProcess.start(self._setup, patience_s, _START_S)
            return self._process
