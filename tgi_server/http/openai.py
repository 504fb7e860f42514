"""What OpenAI's endpoints have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tgi_server.config import ServerConfig
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.schema import Fields, shown
from tgi_server.text.tokenizer import Tokenizer

# `tgi` is what TGI's documentation says; huggingface_hub's client sends `dummy` when it is given a URL.
_PLACEHOLDERS = ("tgi", "dummy")

# Hints and labels for whoever keeps accounts; they change no answer.
_LABELS = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention",
)  # fmt: skip

# What other servers' clients send by default, and what they may say as long as it asks for nothing.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "bad_words": ([],),
    "documents": ([],),
    "length_penalty": (1, 1.0),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}

DONE: Final = b"data: [DONE]\n\n"


def check_model(config: ServerConfig, fields: Fields) -> str:
    """The model's name to answer under: it may be left out, be a placeholder, or the served one."""
    name = fields.text("model")
    if name is None or name in (config.model_id, *_PLACEHOLDERS):
        return config.model_id
    raise unknown_model(config, name)


def unknown_model(config: ServerConfig, name: str) -> UserError:
    message = f"there is no model {shown(name)}; this server has {config.model_id!r}"
    return UserError(ErrorKind.NOT_FOUND, message, "model", "model_not_found")


def refuse_unsupported(fields: Fields) -> None:
    """Fields of features to come, by name; values that ask for nothing pass, and so do mere labels."""
    fields.know(*_LABELS)
    fields.neutral("tools", [])
    fields.neutral("tool_choice", "none", "auto")
    fields.neutral("functions", [])
    fields.neutral("function_call", "none", "auto")
    fields.neutral("response_format", {"type": "text"})
    fields.neutral("modalities", ["text"])
    fields.neutral("parallel_tool_calls", True, False)
    for name, neutral in _NEUTRAL.items():
        fields.neutral(name, *neutral)
    fields.refuse_all(
        "adapter_id", "audio", "grammar", "moderation", "prediction", "web_search_options", "tool_prompt",
        "chat_template", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
        "structured_outputs", "prompt_logprobs", "allowed_token_ids", "truncate_prompt_tokens",
        "logits_processors",
    )  # fmt: skip


@dataclass(frozen=True)
class StreamUsage:
    """Whether a stream ends with its usage, and whether every chunk before tells it so far."""

    at_end: bool = False
    always: bool = False


def read_stream_options(fields: Fields, *, stream: bool) -> StreamUsage:
    if fields.has("stream_options") and not stream:
        fields.refuse("stream_options", "only means something with stream: true; leave it out")
    options = fields.child("stream_options")
    if options is None:
        return StreamUsage()
    at_end = options.flag("include_usage") is True
    always = options.flag("continuous_usage_stats") is True
    if always and not at_end:
        options.refuse("continuous_usage_stats", "needs include_usage: true beside it")
    return StreamUsage(at_end, always)


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
