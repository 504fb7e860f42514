"""OpenAI's `/v1/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import accumulate

from aiohttp import web

from tgi_server.errors import Flavour
from tgi_server.http.answers import json_response, sse_event
from tgi_server.http.body import read_fields
from tgi_server.http.choices import collect, generate_each
from tgi_server.http.generation import Finish, Job, Piece, maker_of
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
from tgi_server.http.parameters import (
    MAX_CHOICES,
    MAX_OPENAI_TOP_TOKENS,
    Parameters,
    read_openai,
    refuse_unhonoured,
)
from tgi_server.http.prompt import check_answers, check_ids, encode, most_input_tokens, room_for_answer
from tgi_server.http.schema import Fields, ignored_header, invalid
from tgi_server.http.sse import stream_events
from tgi_server.http.state import CONFIG, HONOURED, TEXT, VERSION
from tgi_server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Query:
    """A body of `/v1/completions`, checked. The answers of job j are numbered from j * choices on."""

    jobs: list[Job]
    prompts: list[str]  # as text, for `echo`
    choices: int  # answers to give of each prompt; `best_of` may generate more
    model: str
    stream: bool
    usage: StreamUsage
    echo: bool
    prompt_only: bool  # `max_tokens: 0`: the answer is the prompt and its logprobs
    token_ids: bool
    headers: Mapping[str, str]

    @property
    def parameters(self) -> Parameters:
        return self.jobs[0].parameters

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.prompt_ids) for job in self.jobs)


async def post_completions(request: web.Request) -> web.StreamResponse:
    return await answer_completions(request, await read_fields(request))


async def answer_completions(request: web.Request, fields: Fields) -> web.StreamResponse:
    query = await _read(request.app, fields)
    if query.stream:
        return await stream_events(request, _events(request, query), Flavour.OPENAI, query.headers)
    text = request.app[TEXT]
    answers = await collect(maker_of(request), query.jobs)
    generated = 0 if query.prompt_only else sum(map(len, answers))
    body = {
        **_head(query, request.app[VERSION]),
        "choices": [
            _choice(query, index, job, answer, text.tokenizer)
            for index, (job, answer) in enumerate(_best(query, answers))
        ],
        "usage": usage(query.prompt_tokens, generated),
    }
    return json_response(body, headers=query.headers)


async def _read(app: web.Application, fields: Fields) -> _Query:
    config, text = app[CONFIG], app[TEXT]
    model = check_model(config, fields)
    refuse_unsupported(fields)
    echo = fields.flag("echo") is True
    parameters = read_openai(
        fields,
        app[HONOURED],
        text.vocab_size,
        config.sampling_defaults,
        least_tokens=0 if echo else 1,
    )
    choices = parameters.choices
    stream = fields.flag("stream") is True
    stream_usage = read_stream_options(fields, stream=stream)
    parameters = _logprobs_asked(fields, parameters, app[HONOURED], echo=echo)
    parameters = replace(parameters, choices=_best_of(fields, parameters, app[HONOURED], stream=stream))
    special = fields.flag("add_special_tokens") is not False
    given = _prompts(fields, config.max_client_batch_size)
    check_answers(config, len(given) * parameters.choices, "n" if parameters.choices > 1 else "prompt")
    jobs, prompts = [], []
    for prompt, path in given:
        if isinstance(prompt, str):
            ids = await encode(app, prompt, path, add_special_tokens=special)
            await asyncio.sleep(0)  # short ones are encoded here: let streams go on between them
        else:
            ids = check_ids(text, prompt, path, most_input_tokens(config))
        room = room_for_answer(config, len(ids), parameters.max_new_tokens or None, path, "max_tokens")
        jobs.append(Job(ids, 1 if parameters.max_new_tokens == 0 else room, parameters))
        prompts.append(prompt if isinstance(prompt, str) else text.tokenizer.decode(ids))
    return _Query(
        jobs=jobs,
        prompts=prompts,
        choices=choices,
        model=model,
        stream=stream,
        usage=stream_usage,
        echo=echo,
        prompt_only=parameters.max_new_tokens == 0,
        token_ids=fields.flag("return_token_ids") is True,
        headers=ignored_header(fields, strict=config.strict_fields),
    )


def _prompts(fields: Fields, most: int) -> list[tuple[str | list[object], str]]:
    """One text, one list of token ids, or an array of either; each with the path to name it by."""
    value = fields.raw("prompt")
    if isinstance(value, str):
        return [(value, "prompt")]
    if not isinstance(value, list) or not value:
        fields.refuse(
            "prompt", "is missing or empty; give a string, an array of token ids, or an array of those"
        )
    if all(isinstance(entry, (int, float)) for entry in value):
        return [(value, "prompt")]
    fields.items("prompt", most)
    prompts: list[tuple[str | list[object], str]] = []
    for i, entry in enumerate(value):
        if not isinstance(entry, (str, list)):
            invalid(f"prompt[{i}]", "is neither a string nor an array of token ids")
        prompts.append((entry, f"prompt[{i}]"))
    return prompts


def _logprobs_asked(
    fields: Fields, parameters: Parameters, honoured: frozenset[str], *, echo: bool
) -> Parameters:
    """`logprobs` is how many of the likeliest tokens to list; with `echo`, for the prompt's tokens too."""
    top = fields.integer("logprobs", 0, MAX_OPENAI_TOP_TOKENS)
    if top is None:
        return parameters
    if top:
        refuse_unhonoured(fields, "logprobs", "top_logprobs", honoured)
    if echo:
        refuse_unhonoured(fields, "logprobs", "prompt_logprobs", honoured)
    return replace(parameters, logprobs=True, top_logprobs=top, prompt_logprobs=echo)


def _best_of(fields: Fields, parameters: Parameters, honoured: frozenset[str], *, stream: bool) -> int:
    """How many answers to generate so that the likeliest `n` can be given."""
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of is None or best_of == parameters.choices:
        return parameters.choices
    refuse_unhonoured(fields, "best_of", "choice", honoured)
    if best_of < parameters.choices:
        fields.refuse("best_of", f"is {best_of}, less than n {parameters.choices}")
    if stream or parameters.greedy:
        fields.refuse("best_of", "needs sampling and no stream; leave it out")
    return best_of


def _best(query: _Query, answers: Sequence[Sequence[Piece]]) -> list[tuple[int, Sequence[Piece]]]:
    """(job, answer) of the answers to give: all, or of each prompt the likeliest by mean logprob."""
    made = query.parameters.choices
    given = []
    for job in range(len(query.jobs)):
        own = answers[job * made : (job + 1) * made]
        if made > query.choices:
            own = sorted(own, key=lambda answer: -sum(piece.logprob for piece in answer) / len(answer))
        given += [(job, answer) for answer in own[: query.choices]]
    return given


def _head(query: _Query, version: str) -> dict[str, object]:
    return {
        "id": f"cmpl-{new_id()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": query.model,
        "system_fingerprint": f"{version}-native",
    }


def _choice(
    query: _Query, index: int, job: int, answer: Sequence[Piece], tokenizer: Tokenizer
) -> dict[str, object]:
    pieces = [] if query.prompt_only else answer
    finish = Finish.LENGTH if query.prompt_only else answer[-1].finish
    text = "".join(piece.shown for piece in pieces)
    logprobs = None
    if query.parameters.logprobs:
        entries = _prompt_entries(query.jobs[job], answer[0]) if query.echo else []
        logprobs = _logprobs([*entries, *map(_entry, pieces)], query.parameters.top_logprobs, tokenizer)
    choice: dict[str, object] = {
        "index": index,
        "text": query.prompts[job] + text if query.echo else text,
        "logprobs": logprobs,
        "finish_reason": finish.openai if finish else None,
    }
    if query.token_ids:
        choice["prompt_token_ids"] = query.jobs[job].prompt_ids
        choice["token_ids"] = [piece.token_id for piece in pieces]
    return choice


async def _events(request: web.Request, query: _Query) -> AsyncGenerator[bytes, None]:
    """Chunks of text as it becomes certain; each answer's last has the reason it ended."""
    head = {**_head(query, request.app[VERSION]), "choices": [], "usage": None}
    streams: dict[int, _Stream] = {}
    count = 0
    async with aclosing(generate_each(maker_of(request), query.jobs)) as pieces:
        async for index, piece in pieces:
            count += not query.prompt_only
            if index not in streams:
                streams[index] = _Stream(query, index, request.app[TEXT].tokenizer)
            if query.usage.always:
                head["usage"] = usage(query.prompt_tokens, count)
            for choice in streams[index].push(piece):
                yield sse_event({**head, "choices": [choice]})
    if query.usage.at_end:
        yield sse_event({**head, "usage": usage(query.prompt_tokens, count)})
    yield DONE


class _Stream:
    """The chunks of one answer."""

    def __init__(self, query: _Query, index: int, tokenizer: Tokenizer) -> None:
        self._query = query
        self._index = index
        self._job = index // query.parameters.choices
        self._tokenizer = tokenizer
        self._waiting: list[Piece] = []  # whose text is not shown yet
        self._offset = 0
        self._begun = False

    def push(self, piece: Piece) -> Iterable[dict[str, object]]:
        """The chunks that can be sent now that `piece` is there."""
        query = self._query
        if query.echo and not self._begun:
            entries = (
                _prompt_entries(query.jobs[self._job], piece) if query.parameters.prompt_logprobs else []
            )
            finish = Finish.LENGTH if query.prompt_only else None
            yield self._choice(query.prompts[self._job], entries, [], finish)
        if query.prompt_only:
            return
        self._waiting.append(piece)
        if piece.shown or piece.finish is not None:
            pieces, self._waiting = self._waiting, []
            yield self._choice(piece.shown, [_entry(one) for one in pieces], pieces, piece.finish)

    def _choice(
        self, text: str, entries: Sequence[_Entry], pieces: Sequence[Piece], finish: Finish | None
    ) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": self._index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish.openai if finish else None,
        }
        if self._query.parameters.logprobs:
            top = self._query.parameters.top_logprobs
            choice["logprobs"] = _logprobs(entries, top, self._tokenizer, self._offset)
        if self._query.token_ids:
            if not self._begun:
                choice["prompt_token_ids"] = self._query.jobs[self._job].prompt_ids
            choice["token_ids"] = [one.token_id for one in pieces]
        self._offset += len(text)
        self._begun = True
        return choice


_Entry = tuple[int, float | None, Sequence[tuple[int, float]]]  # token id, its logprob, the likeliest instead


def _entry(piece: Piece) -> _Entry:
    return piece.token_id, piece.logprob, piece.top


def _prompt_entries(job: Job, first: Piece) -> list[_Entry]:
    """The first token of a prompt follows nothing, so that it has no probability."""
    top = first.prompt_top or [()] * len(first.prompt_logprobs)
    rest = zip(job.prompt_ids[1:], first.prompt_logprobs, top, strict=True)
    return [(job.prompt_ids[0], None, ()), *rest]


def _logprobs(
    entries: Sequence[_Entry], top_logprobs: int, tokenizer: Tokenizer, offset: int = 0
) -> dict[str, object]:
    """OpenAI's older shape: parallel arrays. Offsets count characters of the tokens' own texts."""
    tokens = [token_text(tokenizer, token_id) for token_id, _, _ in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [logprob for _, logprob, _ in entries],
        "top_logprobs": [_likeliest(entry, tokenizer) for entry in entries] if top_logprobs else None,
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
    }


def _likeliest(entry: _Entry, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The token itself is always among them, as OpenAI promises. Of tokens spelled alike the likeliest counts."""
    token_id, logprob, top = entry
    if logprob is None:
        return None
    likeliest = {token_text(tokenizer, one): its for one, its in reversed(top)}
    likeliest.setdefault(token_text(tokenizer, token_id), logprob)
    return dict(sorted(likeliest.items(), key=lambda pair: -pair[1]))
