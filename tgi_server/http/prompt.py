"""Prompts: from what a client sent to token ids that fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiohttp import web

from tgi_server.config import ServerConfig
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.schema import check_integer, invalid
from tgi_server.http.state import CONFIG, TEXT, THREADS
from tgi_server.text.text import Text

log = logging.getLogger(__name__)

# Encoding costs about a microsecond per character: longer texts go to a thread, so that streams keep flowing.
_INLINE_CHARS = 2000


async def encode(
    app: web.Application, prompt: str, field: str, *, add_special_tokens: bool, cut: bool = False
) -> list[int]:
    """Token ids of `prompt`, at least one. Raises UserError (INVALID) naming `field`.

    cut: the caller will shorten the prompt, so it may be longer than the context.
    """
    text = app[TEXT]
    if not cut:
        check_length(text, app[CONFIG], prompt, field)
    if len(prompt) <= _INLINE_CHARS:
        ids = text.tokenizer.encode_batch([prompt], add_special_tokens=add_special_tokens)[0]
    else:
        batches = await app[THREADS].run(
            len(prompt), text.tokenizer.encode_batch, [prompt], add_special_tokens=add_special_tokens
        )
        ids = batches[0]
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in text.tokenizer.special_ids and add_special_tokens:
        token = text.tokenizer.token(ids[0])
        log.warning("a prompt begins with %s twice: the tokenizer adds it, so the text should not", token)
    return check_encoded(text, ids, field)


def check_encoded(text: Text, ids: list[int], field: str) -> list[int]:
    """Ids the tokenizer made, if there are any and the model knows them all."""
    if not ids:
        invalid(field, "is empty; give a text of at least one token")
    if max(ids) >= text.vocab_size:
        invalid(field, f"has token {max(ids)}, but the model's vocabulary ends at {text.vocab_size - 1}")
    return ids


def check_length(text: Text, config: ServerConfig, prompt: str, field: str) -> None:
    """Refuse, before encoding it, a text of more characters than the context's tokens can hold."""
    # No token is longer than the longest, so this refuses nothing that could fit.
    most_chars = config.max_total_tokens * text.tokenizer.longest_token_chars
    if len(prompt) > most_chars:
        invalid(
            field,
            f"has {len(prompt)} characters; {config.max_total_tokens} tokens, the most prompt and answer may "
            f"have together, hold at most {most_chars}",
        )


def check_ids(text: Text, ids: Sequence[object], field: str, most: int) -> list[int]:
    """Token ids a client sent instead of a text; none is looked at if there are more than `most`."""
    if not ids:
        invalid(field, "is empty; give at least one token id")
    if len(ids) > most:
        raise UserError(
            ErrorKind.INVALID,
            f"{field} has {len(ids)} tokens; shorten it to {most} at most",
            field,
            "context_length_exceeded",
        )
    return [
        check_integer(token_id, f"{field}[{i}]", 0, text.vocab_size - 1) for i, token_id in enumerate(ids)
    ]


def check_answers(config: ServerConfig, answers: int, field: str) -> None:
    """Refuse what could never be queued; telling such a client to try again later would be a lie."""
    if answers > config.max_queue:
        invalid(field, f"asks for {answers} answers; this server takes at most {config.max_queue} at a time")


def most_input_tokens(config: ServerConfig) -> int:
    """Tokens a prompt may have; at least one is the answer's."""
    most = config.max_total_tokens - 1
    return most if config.max_input_tokens is None else min(config.max_input_tokens, most)


def room_for_answer(
    config: ServerConfig, prompt_tokens: int, max_new_tokens: int | None, prompt_field: str, limit_field: str
) -> int:
    """How many tokens the answer may have: as asked, or all that is left. Never cuts anything silently."""
    total, most = config.max_total_tokens, most_input_tokens(config)
    if prompt_tokens > most:
        raise UserError(
            ErrorKind.INVALID,
            f"{prompt_field} has {prompt_tokens} tokens, but prompt and answer together may have "
            f"{total}; shorten it to {most} at most",
            prompt_field,
            "context_length_exceeded",
        )
    room = total - prompt_tokens
    if max_new_tokens is not None and max_new_tokens > room:
        raise UserError(
            ErrorKind.INVALID,
            f"{limit_field} is {max_new_tokens} and {prompt_field} has {prompt_tokens} tokens, "
            f"{prompt_tokens + max_new_tokens} together, but at most {total} are allowed; "
            f"ask for {room} or fewer, or shorten the prompt",
            limit_field,
            "context_length_exceeded",
        )
    return room if max_new_tokens is None else max_new_tokens
