"""TGI's native endpoints: `/generate` and `/generate_stream`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from aiohttp import web

from tgi_server.errors import Flavour
from tgi_server.http.answers import json_response, sse_event
from tgi_server.http.body import read_fields
from tgi_server.http.choices import collect
from tgi_server.http.generation import Job, Piece, generate, maker_of
from tgi_server.http.parameters import read_tgi
from tgi_server.http.prompt import encode, most_input_tokens, room_for_answer
from tgi_server.http.schema import Fields, ignored_header
from tgi_server.http.sse import stream_events
from tgi_server.http.state import CONFIG, HONOURED, TEXT
from tgi_server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Query:
    """A body of `/generate`, checked."""

    prompt: str
    job: Job
    details: bool
    return_full_text: bool
    headers: Mapping[str, str]
    began_s: float  # monotonic, when reading began
    validated_s: float

    def best_of(self, answers: Sequence[Sequence[Piece]]) -> Sequence[Piece]:
        """The likeliest answer, by the mean of its tokens' logprobs."""
        return max(answers, key=lambda answer: sum(piece.logprob for piece in answer) / len(answer))

    def answer_text(self, answer: Sequence[Piece]) -> str:
        text = "".join(piece.shown for piece in answer)
        return self.prompt + text if self.return_full_text else text


async def post_generate(request: web.Request) -> web.StreamResponse:
    query = await read_query(request.app, await read_fields(request))
    body, headers = await answer_whole(request, query)
    return json_response(body, headers=headers)


async def post_generate_stream(request: web.Request) -> web.StreamResponse:
    return await answer_stream(request, await read_query(request.app, await read_fields(request)))


async def post_compat(request: web.Request) -> web.StreamResponse:
    """TGI's `POST /`: a stream if the body says so, else the answer in an array."""
    return await answer_compat(request, await read_fields(request))


async def answer_compat(request: web.Request, fields: Fields) -> web.StreamResponse:
    stream = fields.flag("stream") is True
    query = await read_query(request.app, fields, full_text=True)
    if stream:
        return await answer_stream(request, query)
    body, headers = await answer_whole(request, query)
    return json_response([body], headers=headers)


async def answer_whole(request: web.Request, query: Query) -> tuple[dict[str, object], Mapping[str, str]]:
    """Body and headers of an answer that is no stream."""
    text = request.app[TEXT]
    answers = await collect(maker_of(request), [query.job])
    best = query.best_of(answers)
    body: dict[str, object] = {"generated_text": query.answer_text(best)}
    if query.details:
        details = _details(query, best, text.tokenizer)
        if len(answers) > 1:
            others = (answer for answer in answers if answer is not best)
            details["best_of_sequences"] = [
                {"generated_text": query.answer_text(other), **_details(query, other, text.tokenizer)}
                for other in others
            ]
        body["details"] = details
    return body, {**query.headers, **_timings(query, answers, best)}


async def answer_stream(request: web.Request, query: Query) -> web.StreamResponse:
    parameters = query.job.parameters
    for name, refused in (
        ("best_of", parameters.choices > 1),
        ("decoder_input_details", parameters.prompt_logprobs),
    ):
        if refused:
            Fields({}, "parameters").refuse(name, "cannot be used in a stream; leave it out")
    return await stream_events(request, _events(request, query), Flavour.TGI, query.headers)


async def read_query(app: web.Application, fields: Fields, *, full_text: bool = False) -> Query:
    """full_text: what `return_full_text` means when it is not given."""
    began_s = time.monotonic()
    config = app[CONFIG]
    prompt = fields.text("inputs")
    if not prompt:
        fields.refuse("inputs", "is missing or empty; give the text to continue")
    asked = fields.child("parameters")
    parameters = read_tgi(asked, app[HONOURED], config)
    asked = asked or Fields({}, "parameters")
    details = asked.flag("details") is True or parameters.prompt_logprobs
    wanted = asked.flag("return_full_text")
    truncate = asked.integer("truncate", 1, most_input_tokens(config))
    ids = await encode(app, prompt, "inputs", add_special_tokens=True, cut=truncate is not None)
    if truncate is not None:
        ids = ids[-truncate:]
    room = room_for_answer(config, len(ids), parameters.max_new_tokens, "inputs", "parameters.max_new_tokens")
    return Query(
        prompt=prompt,
        job=Job(ids, room, parameters),
        details=details,
        return_full_text=full_text if wanted is None else wanted,
        headers={
            "x-compute-type": config.compute_type,
            "x-compute-characters": str(len(prompt)),
            **ignored_header(fields, strict=config.strict_fields),
        },
        began_s=began_s,
        validated_s=time.monotonic(),
    )


async def _events(request: web.Request, query: Query) -> AsyncGenerator[bytes, None]:
    """One event a token; the last has the whole text."""
    shown = []
    async with aclosing(generate(maker_of(request), query.job)) as pieces:
        index = 0
        async for piece in pieces:
            index += 1
            shown.append(piece.shown)
            event: dict[str, object] = {
                "index": index,
                "token": _token(piece),
                "generated_text": None,
                "details": None,
            }
            if query.job.parameters.top_logprobs:
                event["top_tokens"] = _top(piece, request.app[TEXT].tokenizer)
            if piece.finish is not None:
                answer = "".join(shown)
                event["generated_text"] = query.prompt + answer if query.return_full_text else answer
                if query.details:
                    event["details"] = {
                        "finish_reason": piece.finish.value,
                        "generated_tokens": index,
                        "seed": query.job.parameters.seed,
                        "input_length": len(query.job.prompt_ids),
                    }
            yield sse_event(event)


def _token(piece: Piece) -> dict[str, object]:
    return {"id": piece.token_id, "text": piece.text, "logprob": piece.logprob, "special": piece.special}


def _top(piece: Piece, tokenizer: Tokenizer) -> list[dict[str, object]]:
    return [
        {
            "id": token_id,
            "text": tokenizer.decode([token_id], skip_special_tokens=False),
            "logprob": logprob,
            "special": token_id in tokenizer.special_ids,
        }
        for token_id, logprob in piece.top
    ]


def _details(query: Query, answer: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, object]:
    finish = answer[-1].finish
    details: dict[str, object] = {
        "finish_reason": finish.value if finish else None,
        "generated_tokens": len(answer),
        "seed": query.job.parameters.seed,
        "prefill": _prefill(query.job, answer, tokenizer) if query.job.parameters.prompt_logprobs else [],
        "tokens": [_token(piece) for piece in answer],
    }
    if query.job.parameters.top_logprobs:
        details["top_tokens"] = [_top(piece, tokenizer) for piece in answer]
    return details


def _prefill(job: Job, answer: Sequence[Piece], tokenizer: Tokenizer) -> list[dict[str, object]]:
    logprobs = [None, *answer[0].prompt_logprobs]
    return [
        {"id": token_id, "text": tokenizer.decode([token_id], skip_special_tokens=False), "logprob": logprob}
        for token_id, logprob in zip(job.prompt_ids, logprobs, strict=True)
    ]


def _timings(query: Query, answers: Sequence[Sequence[Piece]], best: Sequence[Piece]) -> dict[str, str]:
    """TGI's headers, in milliseconds but for x-compute-time, which is in seconds."""
    now_s = time.monotonic()
    queued_s = best[0].queued_s
    inference_s = max(0.0, now_s - query.validated_s - (queued_s or 0.0))
    headers = {
        "x-compute-time": f"{now_s - query.began_s:.6f}",
        "x-total-time": _ms(now_s - query.began_s),
        "x-validation-time": _ms(query.validated_s - query.began_s),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / len(best)),
        "x-prompt-tokens": str(len(query.job.prompt_ids)),
        "x-generated-tokens": str(sum(map(len, answers))),
    }
    if queued_s is not None:
        headers["x-queue-time"] = _ms(queued_s)
    return headers


def _ms(seconds: float) -> str:
    return str(round(seconds * 1e3))
