"""From a chat's messages to the tokens the model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.messages import read_messages
from tgi_server.http.prompt import check_encoded, check_length, encode
from tgi_server.http.schema import Fields, check_json
from tgi_server.http.state import CONFIG, RENDERER, TEXT, THREADS

_SET_BY_SERVER = (
    "messages", "tools", "documents", "add_generation_prompt", "tokenize",
    "bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now",
)  # fmt: skip


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat. With marks, special-token text in it may be a user's (see `Verbatim`)."""

    rendered: str
    has_marks: bool


async def render_chat(app: web.Application, fields: Fields) -> ChatPrompt:
    """The prompt for a body's messages, by the model's template."""
    text = app[TEXT]
    messages = read_messages(fields)
    renderer = app.get(RENDERER)
    if renderer is None:
        raise UserError(
            ErrorKind.TEMPLATE,
            "this model has no chat template; put a chat_template.jinja in its folder, or use /generate",
            "messages",
        )
    final = messages[-1]
    unfinished = final["role"] == "assistant" and not final.get("tool_calls")
    continues = fields.flag("continue_final_message")
    add_prompt = fields.flag("add_generation_prompt")
    if continues and (add_prompt or not unfinished):
        fields.refuse(
            "continue_final_message", "needs a last message of the assistant and no add_generation_prompt"
        )
    if continues is None:  # as TGI: an answer begun is gone on with
        continues = unfinished and add_prompt is None
    variables = _template_variables(fields)
    verbatim = None if app[CONFIG].parse_special_in_content else text.verbatim
    marked = verbatim.mark(messages) if verbatim else messages
    marked_variables = verbatim.mark(variables) if verbatim else variables
    prompt = await renderer.render(
        marked,
        add_generation_prompt=add_prompt is not False,
        continue_final_message=continues,
        extra=marked_variables,
    )
    return ChatPrompt(prompt, has_marks=marked is not messages or marked_variables is not variables)


async def encode_chat(app: web.Application, prompt: ChatPrompt) -> list[int]:
    """Token ids of a chat. The template wrote the special tokens, none are added."""
    if not prompt.has_marks:
        return await encode(app, prompt.rendered, "messages", add_special_tokens=False)
    text, rendered = app[TEXT], prompt.rendered
    check_length(text, app[CONFIG], rendered, "messages")
    ids, _ = await app[THREADS].run(len(rendered), text.verbatim.encode, rendered)
    return check_encoded(text, ids, "messages")


async def tokenize_chat(
    app: web.Application, prompt: ChatPrompt
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """The text of a chat, its token ids, and which characters each came from."""
    text, rendered, threads = app[TEXT], prompt.rendered, app[THREADS]
    check_length(text, app[CONFIG], rendered, "messages")
    if prompt.has_marks:
        ids, offsets = await threads.run(len(rendered), text.verbatim.encode, rendered)
        return text.verbatim.reveal(rendered), ids, offsets
    ids, offsets = await threads.run(
        len(rendered), text.tokenizer.encode_with_offsets, rendered, add_special_tokens=False
    )
    return rendered, ids, offsets


def _template_variables(fields: Fields) -> Mapping[str, object]:
    """Variables for the template; none may take the place of one the server sets."""
    child = fields.child("chat_template_kwargs")
    if child is None:
        return {}
    variables = {name: child.raw(name) for name in child.names()}
    check_json(variables, "chat_template_kwargs")
    for name in _SET_BY_SERVER:
        if name in variables:
            child.refuse(name, "is set by the server; leave it out")
    return variables
