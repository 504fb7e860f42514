"""Cloud platforms' routes, which wrap the others: SageMaker's `/invocations` and Vertex AI's `/vertex`."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tgi_server.errors import ErrorKind, Flavour, UserError
from tgi_server.http import chat, generate
from tgi_server.http.answers import json_response
from tgi_server.http.body import read_fields
from tgi_server.http.choices import collect
from tgi_server.http.completions import answer_completions
from tgi_server.http.generation import maker_of
from tgi_server.http.prompt import check_answers
from tgi_server.http.schema import Fields, check_object, ignored_header
from tgi_server.http.state import CONFIG, FLAVOUR

_MAX_INSTANCES = 16


async def post_invocations(request: web.Request) -> web.StreamResponse:
    """Whichever request the body is: TGI's by `inputs`, a chat by `messages`, a completion by `prompt`."""
    fields = await read_fields(request)
    if fields.has("inputs"):
        return await generate.answer_compat(request, fields)
    request[FLAVOUR] = Flavour.OPENAI
    if fields.has("messages"):
        return await chat.answer_chat(request, fields)
    if fields.has("prompt"):
        return await answer_completions(request, fields)
    request[FLAVOUR] = Flavour.TGI
    raise UserError(ErrorKind.INVALID, "the body needs one of inputs, messages and prompt", "inputs")


async def post_vertex(request: web.Request) -> web.Response:
    """`instances`, each TGI's request or a chat, to `predictions`, their texts in the same order."""
    fields = await read_fields(request)
    entries = fields.items("instances", _MAX_INSTANCES)
    if not entries:
        fields.refuse("instances", "is missing or empty; give an array of requests")
    instances = [
        Fields(check_object(entry, f"instances[{i}]"), f"instances[{i}]") for i, entry in enumerate(entries)
    ]
    queries = [await _query(request.app, instance) for instance in instances]
    answers = sum(query.job.parameters.choices for query in queries)
    check_answers(request.app[CONFIG], answers, "instances")
    headers = ignored_header(fields, *instances, strict=request.app[CONFIG].strict_fields)
    tasks = [asyncio.create_task(_predict(request, query)) for query in queries]
    try:
        predictions = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return json_response({"predictions": predictions}, headers=headers)


async def _query(app: web.Application, instance: Fields) -> generate.Query | chat.Query:
    """An instance, checked. A prediction is one text: what asks for more, or for it in pieces, is refused."""
    if not instance.has("inputs") and not instance.has("messages"):
        instance.refuse("inputs", "is missing, and so is messages; give one of them")
    if instance.flag("stream"):
        instance.refuse("stream", "is true, but predictions come whole; leave it out")
    if instance.has("inputs"):
        return await generate.read_query(app, instance)
    query = await chat.read_query(app, instance)
    if query.job.parameters.choices > 1:
        instance.refuse("n", f"is {query.job.parameters.choices}, but a prediction is one text; leave it out")
    return query


async def _predict(request: web.Request, query: generate.Query | chat.Query) -> str:
    answers = await collect(maker_of(request), [query.job])
    if isinstance(query, generate.Query):
        return query.answer_text(query.best_of(answers))
    return "".join(piece.shown for piece in answers[0])
