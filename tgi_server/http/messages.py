"""Chat messages: checked, and brought to the form templates expect."""

from __future__ import annotations

import msgspec

from tgi_server.http.schema import Fields, check_json, check_object, check_text, invalid, kind_of, shown

_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(fields: Fields) -> list[dict[str, object]]:
    """`messages`, each with a known role and its content as one string; other keys go to the template."""
    entries = fields.raw("messages")
    if not isinstance(entries, list) or not entries:
        found = "empty" if entries == [] else kind_of(entries)
        fields.refuse("messages", f"is {found}; give an array of at least one message")
    check_json(entries, fields.path("messages"))
    return [_read_message(entry, f"{fields.path('messages')}[{i}]") for i, entry in enumerate(entries)]


def _read_message(entry: object, path: str) -> dict[str, object]:
    message = dict(check_object(entry, path))
    role = message.get("role")
    if role not in _ROLES:
        invalid(f"{path}.role", f"is {shown(role)}; give one of {', '.join(_ROLES)}")
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, role, f"{path}.tool_calls")
    message["content"] = _content(message.get("content"), f"{path}.content", optional=bool(calls))
    return message


def _content(content: object, path: str, *, optional: bool) -> str:
    """A string, or an array of text parts, which are joined."""
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        invalid(path, f"is {kind_of(content)}; give a string or an array of parts")
    texts = []
    for i, entry in enumerate(content):
        part = check_object(entry, f"{path}[{i}]")
        if part.get("type") != "text":
            kind = shown(part.get("type"))
            invalid(f"{path}[{i}].type", f"is {kind}; this model reads only parts of type text")
        texts.append(check_text(part.get("text"), f"{path}[{i}].text"))
    return "".join(texts)


def _tool_calls(calls: object, role: object, path: str) -> list[dict[str, object]]:
    """Earlier calls of the assistant. Arguments come as JSON in a string; templates want what it says."""
    if role != "assistant" or not isinstance(calls, list):
        invalid(path, "must be an array, and only the assistant's messages have it")
    read = []
    for i, entry in enumerate(calls):
        call = dict(check_object(entry, f"{path}[{i}]"))
        function = dict(check_object(call.get("function"), f"{path}[{i}].function"))
        check_text(function.get("name"), f"{path}[{i}].function.name")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            try:
                function["arguments"] = msgspec.json.decode(arguments)
            except (msgspec.MsgspecError, RecursionError) as error:
                invalid(f"{path}[{i}].function.arguments", f"is not JSON: {error}")
            check_json(function["arguments"], f"{path}[{i}].function.arguments")
        call["function"] = function
        read.append(call)
    return read
