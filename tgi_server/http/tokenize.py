"""Text to tokens and back, for clients that count: `/tokenize`, `/detokenize`, `/chat_tokenize`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import accumulate

from aiohttp import web

from tgi_server.http.answers import json_response
from tgi_server.http.body import read_fields
from tgi_server.http.chat_prompt import render_chat, tokenize_chat
from tgi_server.http.openai import check_model
from tgi_server.http.prompt import check_ids, check_length
from tgi_server.http.schema import ignored_header
from tgi_server.http.state import CONFIG, TEXT, THREADS

_MAX_IDS = 100_000


async def post_tokenize(request: web.Request) -> web.Response:
    """TGI's: a `/generate` body in, an array of tokens out. The parameters change nothing."""
    text, config = request.app[TEXT], request.app[CONFIG]
    fields = await read_fields(request)
    fields.know("parameters")
    special = fields.flag("add_special_tokens") is not False
    prompt = fields.text("inputs")
    if prompt is None:
        fields.refuse("inputs", "is missing; give the text to tokenize")
    check_length(text, config, prompt, "inputs")
    headers = ignored_header(fields, strict=config.strict_fields)
    ids, offsets = await request.app[THREADS].run(
        len(prompt), text.tokenizer.encode_with_offsets, prompt, add_special_tokens=special
    )
    return json_response(_describe(prompt, ids, offsets), headers=headers)


async def post_detokenize(request: web.Request) -> web.Response:
    """Token ids in `tokens`, their text out as `prompt`, special tokens included."""
    fields = await read_fields(request)
    text, config = request.app[TEXT], request.app[CONFIG]
    check_model(config, fields)
    ids = check_ids(text, fields.items("tokens", _MAX_IDS) or [], "tokens", _MAX_IDS)
    headers = ignored_header(fields, strict=config.strict_fields)
    prompt = await asyncio.to_thread(text.tokenizer.decode, ids, skip_special_tokens=False)
    return json_response({"prompt": prompt}, headers=headers)


async def post_chat_tokenize(request: web.Request) -> web.Response:
    """A chat's prompt as the model will see it, and its tokens; other fields change nothing."""
    fields = await read_fields(request)
    check_model(request.app[CONFIG], fields)
    prompt, ids, offsets = await tokenize_chat(request.app, await render_chat(request.app, fields))
    return json_response({"tokenize_response": _describe(prompt, ids, offsets), "templated_text": prompt})


def _describe(prompt: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[dict[str, object]]:
    """TGI counts `start` and `stop` in bytes of the text's UTF-8."""
    byte_at: Sequence[int] = range(len(prompt) + 1)
    if not prompt.isascii():
        byte_at = list(accumulate((len(char.encode()) for char in prompt), initial=0))
    return [
        {"id": token_id, "text": prompt[start:stop], "start": byte_at[start], "stop": byte_at[stop]}
        for token_id, (start, stop) in zip(ids, offsets, strict=True)
    ]
