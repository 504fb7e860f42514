"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from aiohttp import web

from tgi_server.errors import Flavour
from tgi_server.http.answers import json_response, sse_event
from tgi_server.http.body import read_fields
from tgi_server.http.chat_prompt import encode_chat, render_chat
from tgi_server.http.choices import collect, generate_each
from tgi_server.http.generation import Job, Piece, maker_of
from tgi_server.http.ids import new_id
from tgi_server.http.openai import (
    DONE,
    StreamUsage,
    check_model,
    read_stream_options,
    refuse_unsupported,
    token_text,
    usage,
)
from tgi_server.http.parameters import MAX_OPENAI_TOP_TOKENS, Parameters, read_openai, refuse_unhonoured
from tgi_server.http.prompt import check_answers, room_for_answer
from tgi_server.http.schema import Fields, ignored_header
from tgi_server.http.sse import stream_events
from tgi_server.http.state import CONFIG, HONOURED, TEXT, VERSION
from tgi_server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Query:
    """A body of `/v1/chat/completions`, checked."""

    job: Job
    model: str
    stream: bool
    usage: StreamUsage
    token_ids: bool  # whether the answer lists the ids of prompt and answer
    headers: Mapping[str, str]


async def post_chat(request: web.Request) -> web.StreamResponse:
    return await answer_chat(request, await read_fields(request))


async def answer_chat(request: web.Request, fields: Fields) -> web.StreamResponse:
    query = await read_query(request.app, fields)
    if query.stream:
        return await stream_events(request, _events(request, query), Flavour.OPENAI, query.headers)
    text = request.app[TEXT]
    answers = await collect(maker_of(request), [query.job])
    body = {
        **_head(query, "chat.completion", request.app[VERSION]),
        "choices": [_choice(query, index, answer, text.tokenizer) for index, answer in enumerate(answers)],
        "usage": usage(len(query.job.prompt_ids), sum(map(len, answers))),
    }
    if query.token_ids:
        body["prompt_token_ids"] = query.job.prompt_ids
    return json_response(body, headers=query.headers)


async def read_query(app: web.Application, fields: Fields) -> Query:
    config, text = app[CONFIG], app[TEXT]
    model = check_model(config, fields)
    refuse_unsupported(fields)
    parameters = _parameters(fields, app[HONOURED], text.vocab_size, config.sampling_defaults)
    check_answers(config, parameters.choices, "n")
    stream = fields.flag("stream") is True
    stream_usage = read_stream_options(fields, stream=stream)
    ids = await encode_chat(app, await render_chat(app, fields))
    limit_field = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    room = room_for_answer(config, len(ids), parameters.max_new_tokens, "messages", limit_field)
    return Query(
        job=Job(ids, room, parameters),
        model=model,
        stream=stream,
        usage=stream_usage,
        token_ids=fields.flag("return_token_ids") is True,
        headers=ignored_header(fields, strict=config.strict_fields),
    )


def _parameters(
    fields: Fields, honoured: frozenset[str], vocab_size: int, defaults: Mapping[str, float]
) -> Parameters:
    logprobs = fields.flag("logprobs") is True
    top = fields.integer("top_logprobs", 0, MAX_OPENAI_TOP_TOKENS) or 0
    if top and not logprobs:
        fields.refuse("top_logprobs", f"is {top}, but logprobs is not true; set it, or leave both out")
    if top:
        refuse_unhonoured(fields, "top_logprobs", "top_logprobs", honoured)
    return replace(read_openai(fields, honoured, vocab_size, defaults), logprobs=logprobs, top_logprobs=top)


def _head(query: Query, kind: str, version: str) -> dict[str, object]:
    return {
        "id": f"chatcmpl-{new_id()}",
        "object": kind,
        "created": int(time.time()),
        "model": query.model,
        "system_fingerprint": f"{version}-native",
    }


def _choice(query: Query, index: int, answer: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, object]:
    finish = answer[-1].finish
    choice: dict[str, object] = {
        "index": index,
        "message": {"role": "assistant", "content": "".join(piece.shown for piece in answer)},
        "logprobs": _logprobs(answer, tokenizer) if query.job.parameters.logprobs else None,
        "finish_reason": finish.openai if finish else None,
    }
    if query.token_ids:
        choice["token_ids"] = [piece.token_id for piece in answer]
    return choice


async def _events(request: web.Request, query: Query) -> AsyncGenerator[bytes, None]:
    """A first chunk with the role, chunks of text as it becomes certain, and a last one with the reason."""
    text = request.app[TEXT]
    head = {**_head(query, "chat.completion.chunk", request.app[VERSION]), "choices": [], "usage": None}
    waiting: dict[int, list[Piece]] = {}  # pieces whose text is not shown yet
    prompt_ids, count = query.job.prompt_ids, 0
    detailed = query.job.parameters.logprobs or query.token_ids
    async with aclosing(generate_each(maker_of(request), [query.job])) as pieces:
        async for index, piece in pieces:
            if query.usage.always:
                head["usage"] = usage(len(prompt_ids), count)
            if index not in waiting:
                waiting[index] = []
                first = {**head, "prompt_token_ids": prompt_ids} if query.token_ids else head
                yield _chunk(first, index, {"role": "assistant", "content": ""})
            count += 1
            if query.usage.always:
                head["usage"] = usage(len(prompt_ids), count)
            waiting[index].append(piece)
            if piece.shown or (piece.finish and detailed):
                details = _details(query, waiting[index], text.tokenizer) if detailed else {}
                waiting[index] = []
                yield _chunk(head, index, {"content": piece.shown}, details)
            if piece.finish is not None:
                yield _chunk(head, index, {}, {"finish_reason": piece.finish.openai})
    if query.usage.at_end:
        yield sse_event({**head, "usage": usage(len(prompt_ids), count)})
    yield DONE


def _chunk(
    head: Mapping[str, object],
    index: int,
    delta: Mapping[str, object],
    more: Mapping[str, object] | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **(more or {})}
    return sse_event({**head, "choices": [choice]})


def _details(query: Query, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, object]:
    """What a client asked to know of the tokens of a chunk."""
    details: dict[str, object] = {}
    if query.job.parameters.logprobs:
        details["logprobs"] = _logprobs(pieces, tokenizer)
    if query.token_ids:
        details["token_ids"] = [piece.token_id for piece in pieces]
    return details


def _logprobs(pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, object]:
    def entry(token_id: int, logprob: float) -> dict[str, object]:
        data = list(tokenizer.token_bytes(token_id))
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": data}

    return {
        "content": [
            {
                **entry(piece.token_id, piece.logprob),
                "top_logprobs": [entry(token_id, logprob) for token_id, logprob in piece.top],
            }
            for piece in pieces
        ],
        "refusal": None,
    }
