"""An engine without a model: it answers with the bytes of a text it was told to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from tgi_server.engine.request import EngineStatus, FinishReason, GenerationRequest, TokenEvent
from tgi_server.errors import UserError

NEVER = 10**9


@dataclass
class FakeEngine:
    """Says `script`, token ids, then the request's first stop id. Remembers what it was asked."""

    script: Sequence[int] = ()
    choices: Sequence[
        tuple[Sequence[int], float]
    ] = ()  # what choice 0, 1, … says instead, and its tokens' logprob
    burst: int = 1  # tokens an event carries
    fail_at: int = NEVER  # raise `failure` instead of this token
    failure: Exception | None = None
    stall_at: int = NEVER  # say nothing more from this token on
    delay_s: float = 0.0
    status: EngineStatus = field(default_factory=lambda: EngineStatus(phase="ready"))
    alive: bool = True
    silent_s: float = 0.0
    requests: list[GenerationRequest] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0

    def heartbeat_age_s(self) -> float:
        return self.silent_s

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        self.running += 1
        finished = False
        try:
            script, logprob = self.script, -0.5
            if self.choices:
                script, logprob = self.choices[request.sampling.choice]
            tokens = [*script, *request.stop_token_ids[:1]]
            tokens = list(islice(cycle(tokens), request.max_new_tokens))
            tokens = tokens[
                : 1 + next((i for i, t in enumerate(tokens) if t in request.stop_token_ids), len(tokens))
            ]
            for start in range(0, len(tokens), self.burst):
                await asyncio.sleep(self.delay_s)
                chunk = tokens[start : start + self.burst]
                if start >= self.stall_at:
                    await asyncio.Event().wait()
                if start >= self.fail_at and self.failure is not None:
                    raise self.failure
                finished = start + self.burst >= len(tokens)
                yield self._event(request, chunk, start, finished, logprob)
        except UserError:
            finished = True
            raise
        finally:
            self.running -= 1
            self.cancelled += not finished

    @staticmethod
    def _event(
        request: GenerationRequest, chunk: list[int], start: int, finished: bool, logprob: float
    ) -> TokenEvent:
        reason = FinishReason.EOS if chunk[-1] in request.stop_token_ids else FinishReason.LENGTH
        first = start == 0
        return TokenEvent(
            id=request.id,
            token_ids=chunk,
            logprobs=[logprob] * len(chunk),
            finish=reason if finished else None,
            top=[[(t, -0.5 - i) for i, t in enumerate(range(request.top_logprobs))] for _ in chunk],
            prompt_logprobs=[-1.0] * (len(request.prompt_ids) - 1)
            if first and request.prompt_logprobs
            else [],
            queued_s=0.002 if first else None,
        )
