"""What OpenAI's endpoints have in common."""

from __future__ import annotations

from typing import Final

from tgi_server.config import ServerConfig
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.schema import Fields, shown
from tgi_server.text.tokenizer import Tokenizer

# `tgi` is what TGI's documentation says; huggingface_hub's client sends `dummy` when it is given a URL.
_PLACEHOLDERS = ("tgi", "dummy")

DONE: Final = b"data: [DONE]\n\n"


def check_model(config: ServerConfig, fields: Fields) -> str:
    """The model's name to answer under: it may be left out, be a placeholder, or the served one."""
    name = fields.text("model")
    if name is None or name in (config.model_id, *_PLACEHOLDERS):
        return config.model_id
    raise UserError(
        ErrorKind.NOT_FOUND, f"there is no model {shown(name)}; this server has {config.model_id!r}", "model"
    )


def refuse_unsupported(fields: Fields) -> None:
    """Fields of features to come, by name; values that ask for nothing pass, and so do mere labels."""
    fields.know("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
    fields.neutral("tools", [])
    fields.neutral("tool_choice", "none", "auto")
    fields.neutral("functions", [])
    fields.neutral("function_call", "none", "auto")
    fields.neutral("response_format", {"type": "text"})
    fields.neutral("modalities", ["text"])
    fields.neutral("parallel_tool_calls", True, False)
    fields.refuse_all(
        "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "tool_prompt",
        "chat_template", "suffix",
        "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
        "documents", "prompt_logprobs", "bad_words", "allowed_token_ids",
    )  # fmt: skip


def read_stream_options(fields: Fields, *, stream: bool) -> bool:
    """Whether a stream ends with its usage."""
    if fields.has("stream_options") and not stream:
        fields.refuse("stream_options", "only means something with stream: true; leave it out")
    options = fields.child("stream_options")
    return options is not None and options.flag("include_usage") is True


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token on its own; one that is no whole characters is spelled as OpenAI does, `bytes:\\xe2\\x82`."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
