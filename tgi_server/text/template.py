"""Chat templates: messages to the prompt a checkpoint was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tgi_server.errors import ErrorKind, StartupError, UserError

_MAX_COMPLAINT_CHARS = 500
_MAX_SOURCE_CHARS = (
    100_000  # five times the longest in use; jinja2 needs 10 s a million, and nobody can stop it
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A checkpoint's chat templates by name; most have only `default`, some one more for tools."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError for a source that is no template."""
        environment = _environment()
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self.sources = sources
        self.special_tokens = special_tokens

    @classmethod
    def from_folder(
        cls, folder: Path, config_file: Path | None = None, template_file: Path | None = None
    ) -> ChatTemplate | None:
        """Read `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` or `chat_template.json`.

        None if there is none of these. Special tokens the config does not name are those of
        `special_tokens_map.json`. config_file, template_file: read instead; they must exist.
        """
        for given in (config_file, template_file):
            if given is not None and not given.is_file():
                raise StartupError(f"{given} does not exist")
        own_template = config_file is None and template_file is None
        config_file = config_file or folder / "tokenizer_config.json"
        config = _read_if_there(config_file)
        named = {**_read_if_there(folder / "special_tokens_map.json"), **config}
        special = {
            name: token for name in _SPECIAL_TOKENS if (token := _token_text(named.get(name))) is not None
        }
        file = template_file or folder / "chat_template.jinja"
        if file.is_file() and (own_template or template_file):
            sources = {"default": file.read_text(encoding="utf-8")}
        else:
            file = config_file
            sources = _sources(config.get("chat_template"))
        if not sources and own_template:
            file = folder / "chat_template.json"
            sources = _sources(_read_if_there(file).get("chat_template"))
        if not sources:
            return None
        if (chars := sum(map(len, sources.values()))) > _MAX_SOURCE_CHARS:
            raise StartupError(
                f"{file}: a chat template of {chars} characters; {_MAX_SOURCE_CHARS} are taken at most"
            )
        try:
            return cls(sources, special)
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(f"{file}: line {error.lineno} of the chat template: {error.message}") from None
        except (RecursionError, SyntaxError) as error:
            raise StartupError(f"{file}: the chat template is nested too deep ({error})") from None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, object] | None = None,
        most_chars: int = 1 << 30,
    ) -> str:
        """The prompt for `messages`. Takes as long as the template likes: `Renderer` bounds it.

        continue_final_message: end inside the last message, so that the model goes on with it.
        extra: further variables a client gives its template. They cannot replace the ones above.
        Raises UserError (TEMPLATE) with the template's own words when it refuses the messages, or if the prompt has
        more than `most_chars`.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name) or next(iter(self._templates.values()))
        variables: dict[str, object] = {
            **(extra or {}),
            **self.special_tokens,
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            prompt = _join(template.generate(variables), most_chars)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise UserError(
                ErrorKind.TEMPLATE,
                f"the model's chat template does not accept these messages: {_quoted(error)}",
                "messages",
            ) from None
        return _cut_after_final(prompt, messages) if continue_final_message else prompt


def _quoted(error: Exception) -> str:
    """What a template says, which may hold anything a client sent: short, and without control characters."""
    return "".join(char if char.isprintable() else "?" for char in str(error)[:_MAX_COMPLAINT_CHARS])


def _join(parts: Iterable[str], most_chars: int) -> str:
    chars = 0
    kept = []
    for part in parts:
        chars += len(part)
        if chars > most_chars:
            raise ValueError(f"the prompt it writes has more than {most_chars} characters")
        kept.append(part)
    return "".join(kept)


def _cut_after_final(prompt: str, messages: Sequence[Mapping[str, object]]) -> str:
    content = str(messages[-1].get("content") or "").strip()
    start = prompt.rfind(content)
    if start < 0:
        raise UserError(
            ErrorKind.TEMPLATE,
            "the last message cannot be continued: the model's chat template changes its text",
            f"messages[{len(messages) - 1}].content",
        )
    return prompt[: start + len(content)]


class _GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's words for training; to a server it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance's attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes < > & for web pages; models were trained on the plain text.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _sources(value: object) -> dict[str, str]:
    """`chat_template` is a string, or a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else []
    return {
        str(entry["name"]): str(entry["template"])
        for entry in entries
        if isinstance(entry, dict) and "name" in entry and "template" in entry
    }


def _read_if_there(file: Path) -> Mapping[str, object]:
    return _read_object(file) if file.is_file() else {}


def _token_text(value: object) -> str | None:
    """A special token is a string, or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_object(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{file} holds a {type(value).__name__}, not a JSON object")
    return value
