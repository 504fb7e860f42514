"""The one path from a request to its answer's pieces, whatever the flavour of the API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec
from aiohttp import web

from tgi_server.engine.request import FinishReason, GenerationRequest
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.ids import new_id
from tgi_server.http.metrics import Turn
from tgi_server.http.parameters import Parameters
from tgi_server.http.state import ENGINE, TENANT, TEXT, TURN, Engine
from tgi_server.text.incremental import CONTEXT_TOKENS, incremental_decoder
from tgi_server.text.stop import StopMatcher
from tgi_server.text.text import Text


class Finish(Enum):
    """Why an answer ended; the value is TGI's word for it."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"

    @property
    def openai(self) -> str:
        return "length" if self is Finish.LENGTH else "stop"


_FINISH: Final[dict[FinishReason | None, Finish]] = {
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.EOS: Finish.EOS,
}


@dataclass(frozen=True)
class Job:
    """One prompt and how to answer it."""

    prompt_ids: list[int]
    max_new_tokens: int
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer, and the text that may be shown once it is known."""

    token_id: int
    text: str  # the token's own text: empty inside a character, a special token as the vocabulary spells it
    special: bool
    logprob: float
    shown: str  # text of the answer, stop strings taken into account; joined, this is the answer
    top: Sequence[tuple[int, float]] = ()
    finish: Finish | None = None
    prompt_logprobs: Sequence[float] = ()  # with the first piece
    prompt_top: Sequence[Sequence[tuple[int, float]]] = ()  # with the first piece
    queued_s: float | None = None  # with the first piece


def make_request(job: Job, text: Text, choice: int = 0, tenant: str = "") -> GenerationRequest:
    """What the engine gets to see of a job, for the answer with number `choice`.

    tenant: who asks. Nobody else's requests find its prompts in the cache, but those that know its `cache_salt`.
    """
    parameters = job.parameters
    eos = () if parameters.ignore_eos else text.eos_token_ids
    sampling = parameters.sampling
    return GenerationRequest(
        id=new_id(),
        prompt_ids=job.prompt_ids,
        max_new_tokens=job.max_new_tokens,
        min_new_tokens=parameters.min_new_tokens,
        stop_token_ids=sorted({*eos, *parameters.stop_token_ids}),
        sampling=msgspec.structs.replace(sampling, choice=choice) if choice else sampling,
        top_logprobs=parameters.top_logprobs,
        prompt_logprobs=parameters.prompt_logprobs,
        priority=parameters.priority,
        salt=_salt(parameters.cache_salt, tenant),
    )


def _salt(asked: str, tenant: str) -> str:
    """Prefixes keep a tenant's name from being sent as a `cache_salt`."""
    if asked:
        return f"salt:{asked}"
    return f"key:{tenant}" if tenant else ""


@dataclass(frozen=True)
class Maker:
    """What makes answers for one HTTP request."""

    engine: Engine
    text: Text
    turn: Turn
    tenant: str = ""


def maker_of(request: web.Request) -> Maker:
    return Maker(request.app[ENGINE], request.app[TEXT], request[TURN], request.get(TENANT, ""))


async def generate(maker: Maker, job: Job, choice: int = 0) -> AsyncGenerator[Piece, None]:
    """The pieces of one answer; the last has `finish`. Closing the generator cancels.

    Raises UserError as the engine does, or INCOMPLETE if it stops without a reason.
    """
    tokenizer = maker.text.tokenizer
    decoder = incremental_decoder(tokenizer, job.prompt_ids[-CONTEXT_TOKENS:])
    matcher = StopMatcher(job.parameters.stop_strings, keep=job.parameters.keep_stop)
    count = 0
    request = make_request(job, maker.text, choice, maker.tenant)
    answer = maker.turn.answer(request)
    async with aclosing(maker.engine.submit(request)) as events:
        async for event in events:
            answer.saw(event)
            last = len(event.token_ids) - 1
            for i, token_id in enumerate(event.token_ids):
                count += 1
                special = token_id in tokenizer.special_ids
                grown = decoder.push(token_id)
                ended = event.finish if i == last else None
                if ended is not None:
                    grown += decoder.flush()
                shown, stopped = (
                    matcher.push(grown) if count >= job.parameters.min_new_tokens else (grown, False)
                )
                finish = Finish.STOP if stopped else _FINISH.get(ended)
                if finish is not None and not stopped:
                    shown += matcher.flush()
                yield Piece(
                    token_id=token_id,
                    text=(tokenizer.token(token_id) or "") if special else grown,
                    special=special,
                    logprob=event.logprobs[i],
                    shown=shown,
                    top=event.top[i] if event.top else (),
                    finish=finish,
                    prompt_logprobs=event.prompt_logprobs,
                    prompt_top=event.prompt_top,
                    queued_s=event.queued_s,
                )
                if finish is not None:
                    return
    raise UserError(ErrorKind.INCOMPLETE, "the engine ended this answer without a reason")
