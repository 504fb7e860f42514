"""Shapes of bodies, as JSON schemas. Answers are exact: all that is not optional is there, and nothing else."""

from __future__ import annotations

from typing import Any, Final

from tgi_server.config import ServerConfig
from tgi_server.http.parameters import (
    MAX_CHOICES,
    MAX_OPENAI_STOPS,
    MAX_OPENAI_TOP_TOKENS,
    MAX_PRIORITY,
    MAX_SALT_CHARS,
)
from tgi_server.http.prompt import most_input_tokens
from tgi_server.http.schema import INT32_MAX

Json = dict[str, Any]

_TEXT: Final[Json] = {"type": "string"}
_FLAG: Final[Json] = {"type": "boolean"}
_ID: Final[Json] = {"type": "integer", "minimum": 0}
_SALT: Final[Json] = {"type": "string", "minLength": 1, "maxLength": MAX_SALT_CHARS}
_LOGPROB: Final[Json] = {"type": "number", "maximum": 0}


def all_schemas(config: ServerConfig) -> dict[str, Json]:
    """Every schema by its name."""
    return {
        **_tgi_requests(config),
        **_openai_requests(config),
        **_tgi_answers(),
        **_openai_answers(),
        **_other_answers(),
    }


def _whole(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float, *, above: bool = False) -> Json:
    return {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}


def _array(items: Json, most: int | None = None) -> Json:
    return {"type": "array", "items": items, **({} if most is None else {"maxItems": most})}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(required: tuple[str, ...], /, **fields: Json) -> Json:
    """What a client sends: null stands for a field left out, and unknown fields are named in a header."""
    optional = {name: field if name in required else _or_null(field) for name, field in fields.items()}
    return {"type": "object", "required": list(required), "properties": optional}


def _answer(optional: tuple[str, ...] = (), /, **fields: Json) -> Json:
    required = [name for name in fields if name not in optional]
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


def _tgi_requests(config: ServerConfig) -> dict[str, Json]:
    parameters = _body(
        (),
        best_of=_whole(1, config.max_best_of),
        cache_salt=_SALT,
        decoder_input_details=_FLAG,
        details=_FLAG,
        do_sample=_FLAG,
        frequency_penalty=_number(-2, 2),
        max_new_tokens=_whole(1, INT32_MAX),
        priority=_whole(-MAX_PRIORITY, MAX_PRIORITY),
        repetition_penalty=_number(0.01, 100),
        return_full_text=_FLAG,
        seed={"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        stop={"anyOf": [_TEXT, _array(_TEXT, config.max_stop_sequences)]},
        temperature=_number(0, 100),
        top_k=_whole(0, INT32_MAX),
        top_n_tokens=_whole(0, config.max_top_n_tokens),
        top_p=_number(0, 1, above=True),
        truncate=_whole(1, most_input_tokens(config)),
        typical_p=_number(0, 1, above=True),
        watermark=_FLAG,
    )
    prompt = {"type": "string", "minLength": 1}
    request = _body(("inputs",), inputs=prompt, parameters=_ref("GenerateParameters"))
    compat = _body(("inputs",), inputs=prompt, parameters=_ref("GenerateParameters"), stream=_FLAG)
    instance = {"anyOf": [_ref("GenerateRequest"), _ref("ChatRequest")]}
    return {
        "GenerateParameters": parameters,
        "GenerateRequest": request,
        "CompatGenerateRequest": compat,
        "InvocationsRequest": {
            "anyOf": [_ref("CompatGenerateRequest"), _ref("ChatRequest"), _ref("CompletionRequest")]
        },
        "VertexRequest": _body(("instances",), instances={**_array(instance, 16), "minItems": 1}),
        "TokenizeRequest": _body(
            ("inputs",), inputs=_TEXT, parameters={"type": "object"}, add_special_tokens=_FLAG
        ),
        "DetokenizeRequest": _body(("tokens",), tokens={**_array(_ID), "minItems": 1}, model=_TEXT),
    }


def _openai_fields() -> dict[str, Json]:
    """What both of OpenAI's generating endpoints read."""
    return {
        "model": _TEXT,
        "cache_salt": _SALT,
        "frequency_penalty": _number(-2, 2),
        "ignore_eos": _FLAG,
        "include_stop_str_in_output": _FLAG,
        "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
        "max_tokens": _whole(1, INT32_MAX),
        "min_p": _number(0, 1),
        "min_tokens": _whole(0, INT32_MAX),
        "n": _whole(1, MAX_CHOICES),
        "presence_penalty": _number(-2, 2),
        "priority": _whole(-MAX_PRIORITY, MAX_PRIORITY),
        "repetition_penalty": _number(0.01, 100),
        "return_token_ids": _FLAG,
        "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
        "stop": {"anyOf": [_TEXT, _array(_TEXT, MAX_OPENAI_STOPS)]},
        "stop_token_ids": _array(_ID, 256),
        "stream": _FLAG,
        "stream_options": _body((), continuous_usage_stats=_FLAG, include_usage=_FLAG),
        "temperature": _number(0, 100),
        "top_k": _whole(-1, INT32_MAX),
        "top_p": _number(0, 1, above=True),
        "typical_p": _number(0, 1, above=True),
        "user": _TEXT,
    }


def _openai_requests(config: ServerConfig) -> dict[str, Json]:
    shared = _openai_fields()
    part = _body(("type", "text"), type={"const": "text"}, text=_TEXT)
    message = _body(
        ("role",),
        role={"enum": ["system", "developer", "user", "assistant", "tool"]},
        content={"anyOf": [_TEXT, _array(part)]},
        name=_TEXT,
        tool_calls=_array({"type": "object"}),
        tool_call_id=_TEXT,
    )
    chat = {
        "messages": {**_array(_ref("Message")), "minItems": 1},
        "add_generation_prompt": _FLAG,
        "chat_template_kwargs": {"type": "object"},
        "continue_final_message": _FLAG,
        "logprobs": _FLAG,
        "max_completion_tokens": _whole(1, INT32_MAX),
        "top_logprobs": _whole(0, MAX_OPENAI_TOP_TOKENS),
    }
    prompt = {
        "anyOf": [_TEXT, _array(_ID), _array({"anyOf": [_TEXT, _array(_ID)]}, config.max_client_batch_size)]
    }
    completion = {
        "prompt": prompt,
        "add_special_tokens": _FLAG,
        "best_of": _whole(1, MAX_CHOICES),
        "echo": _FLAG,
        "logprobs": _whole(0, MAX_OPENAI_TOP_TOKENS),
        "max_completion_tokens": _whole(0, INT32_MAX),
    }
    return {
        "Message": message,
        "ChatRequest": _body(("messages",), **shared, **chat),
        "CompletionRequest": _body(
            ("prompt",), **{**shared, "max_tokens": _whole(0, INT32_MAX)}, **completion
        ),
    }


def _tgi_answers() -> dict[str, Json]:
    token = _answer(id=_ID, text=_TEXT, logprob=_LOGPROB, special=_FLAG)
    finish = {"enum": ["length", "eos_token", "stop_sequence"]}
    seed = _or_null({"type": "integer", "minimum": 0})
    tokens, top = _array(_ref("Token")), _array(_array(_ref("Token")))
    details = {
        "finish_reason": finish,
        "generated_tokens": _ID,
        "seed": seed,
        "prefill": _array(_ref("PrefillToken")),
        "tokens": tokens,
        "top_tokens": top,
    }
    sequences = _array(_ref("BestOfSequence"))
    return {
        "Token": token,
        "PrefillToken": _answer(id=_ID, text=_TEXT, logprob=_or_null(_LOGPROB)),
        "BestOfSequence": _answer(("top_tokens",), generated_text=_TEXT, **details),
        "Details": _answer(("top_tokens", "best_of_sequences"), **details, best_of_sequences=sequences),
        "GenerateResponse": _answer(("details",), generated_text=_TEXT, details=_ref("Details")),
        "StreamDetails": _answer(finish_reason=finish, generated_tokens=_ID, seed=seed, input_length=_ID),
        "StreamResponse": _answer(
            ("top_tokens",),
            index={"type": "integer", "minimum": 1},
            token=_ref("Token"),
            top_tokens=tokens,
            generated_text=_or_null(_TEXT),
            details=_or_null(_ref("StreamDetails")),
        ),
        "Error": _answer(error=_TEXT, error_type=_TEXT),
        "VertexResponse": _answer(predictions=_array(_TEXT)),
    }


_FINISH: Final[Json] = {"enum": ["stop", "length"]}
_HEAD: Final[dict[str, Json]] = {
    "id": {"type": "string", "minLength": 1},
    "created": _ID,
    "model": _TEXT,
    "system_fingerprint": _TEXT,
}


def _openai_answers() -> dict[str, Json]:
    error = _answer(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_TEXT)
    model = _answer(id=_TEXT, object={"const": "model"}, created=_ID, owned_by=_TEXT)
    return {
        **_completion_answers(),
        **_chat_answers(),
        "Usage": _answer(prompt_tokens=_ID, completion_tokens=_ID, total_tokens=_ID),
        "OpenAIError": _answer(error=error),
        "Model": model,
        "ModelList": _answer(object={"const": "list"}, data=_array(_ref("Model"))),
    }


def _completion_answers() -> dict[str, Json]:
    logprobs = _answer(
        tokens=_array(_TEXT),
        token_logprobs=_array(_or_null(_LOGPROB)),
        top_logprobs=_or_null(_array(_or_null({"type": "object", "additionalProperties": _LOGPROB}))),
        text_offset=_array(_ID),
    )
    choice = _answer(
        ("token_ids", "prompt_token_ids"),
        index=_ID,
        text=_TEXT,
        logprobs=_or_null(logprobs),
        finish_reason=_or_null(_FINISH),
        token_ids=_array(_ID),
        prompt_token_ids=_array(_ID),
    )
    usage, kind = _or_null(_ref("Usage")), {"const": "text_completion"}
    return {"Completion": _answer((), **_HEAD, object=kind, choices=_array(choice), usage=usage)}


def _chat_answers() -> dict[str, Json]:
    entry = {"token": _TEXT, "logprob": _LOGPROB, "bytes": _array(_whole(0, 255))}
    content = _answer((), **entry, top_logprobs=_array(_answer((), **entry)))
    logprobs = _or_null(_answer(content=_array(content), refusal={"type": "null"}))
    role = {"const": "assistant"}
    choice = _answer(
        ("token_ids",),
        index=_ID,
        message=_answer(role=role, content=_TEXT),
        logprobs=logprobs,
        finish_reason=_FINISH,
        token_ids=_array(_ID),
    )
    delta = _answer(
        ("token_ids",),
        index=_ID,
        delta=_answer(("role", "content"), role=role, content=_TEXT),
        logprobs=logprobs,
        finish_reason=_or_null(_FINISH),
        token_ids=_array(_ID),
    )
    return {
        "ChatCompletion": _answer(
            ("prompt_token_ids",),
            **_HEAD,
            object={"const": "chat.completion"},
            choices=_array(choice),
            usage=_ref("Usage"),
            prompt_token_ids=_array(_ID),
        ),
        "ChatCompletionChunk": _answer(
            ("prompt_token_ids",),
            **_HEAD,
            object={"const": "chat.completion.chunk"},
            choices=_array(delta),
            usage=_or_null(_ref("Usage")),
            prompt_token_ids=_array(_ID),
        ),
    }


def _other_answers() -> dict[str, Json]:
    tokens = _array(_answer(id=_ID, text=_TEXT, start=_ID, stop=_ID))
    text, whole = _or_null(_TEXT), _ID
    return {
        "TokenizeResponse": tokens,
        "DetokenizeResponse": _answer(prompt=_TEXT),
        "ChatTokenizeResponse": _answer(tokenize_response=tokens, templated_text=_TEXT),
        "Info": _answer(
            model_id=_TEXT,
            model_sha=text,
            model_pipeline_tag=text,
            max_concurrent_requests=whole,
            max_best_of=whole,
            max_stop_sequences=whole,
            max_input_tokens=whole,
            max_total_tokens=whole,
            validation_workers=whole,
            max_client_batch_size=whole,
            router=_TEXT,
            version=_TEXT,
            sha=text,
            docker_label=text,
            engine={
                "type": "object",
                "properties": {"matrices": {"type": "object", "additionalProperties": _TEXT}},
                "required": ["matrices"],
            },
        ),
    }
