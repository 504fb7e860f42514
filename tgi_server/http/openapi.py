"""The description of this API that `/openapi.json` serves and `/docs` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tgi_server.config import ServerConfig
from tgi_server.errors import STATUS, ErrorKind, Flavour
from tgi_server.http import openapi_schemas as schemas

Json = dict[str, Any]

_REFUSALS: Final = (
    ErrorKind.UNPARSABLE, ErrorKind.INVALID, ErrorKind.UNAUTHORIZED, ErrorKind.TIMEOUT, ErrorKind.TOO_LARGE,
    ErrorKind.ENCODED,
)  # fmt: skip
_FAILURES: Final = (
    *_REFUSALS, ErrorKind.OVERLOADED, ErrorKind.GENERATION, ErrorKind.INCOMPLETE, ErrorKind.UNAVAILABLE,
    ErrorKind.INTERNAL,
)  # fmt: skip


def document(config: ServerConfig, version: str) -> Json:
    """OpenAPI 3.1; its limits are those of this server."""
    security = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tgi-server",
            "version": version,
            "description": "Text generation with the APIs of TGI and OpenAI.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_generating(), **_counting(), **_operating(config)},
        "components": {"schemas": schemas.all_schemas(config), "securitySchemes": security},
        **({"security": [{"key": []}]} if config.api_keys or config.admin_keys else {}),
    }


def _generating() -> Json:
    tgi, openai = Flavour.TGI, Flavour.OPENAI
    whole = _json(_ref("GenerateResponse"))
    array = _json({"type": "array", "items": _ref("GenerateResponse")})
    return {
        "/generate": _post("Continue a text", "GenerateRequest", whole, tgi),
        "/generate_stream": _post(
            "Continue a text, an event for each token", "GenerateRequest", _events("StreamResponse"), tgi
        ),
        "/": {
            **_post(
                "Continue a text; as a stream if `stream` is true",
                "CompatGenerateRequest",
                {**array, **_events("StreamResponse")},
                tgi,
            ),
            **_probe("Whether requests are answered"),
        },
        "/v1/completions": _post(
            "Continue texts or token ids, in OpenAI's shape",
            "CompletionRequest",
            {**_json(_ref("Completion")), **_events("Completion")},
            openai,
        ),
        "/v1/chat/completions": _post(
            "Answer a chat, in OpenAI's shape",
            "ChatRequest",
            {**_json(_ref("ChatCompletion")), **_events("ChatCompletionChunk")},
            openai,
        ),
        "/invocations": _post(
            "SageMaker: whichever of the three requests the body is",
            "InvocationsRequest",
            {
                **_json(
                    {
                        "anyOf": [
                            array["application/json"]["schema"],
                            _ref("Completion"),
                            _ref("ChatCompletion"),
                        ]
                    }
                ),
                **_events("StreamResponse"),
            },
            tgi,
        ),
        "/vertex": _post("Vertex AI: several requests", "VertexRequest", _json(_ref("VertexResponse")), tgi),
    }


def _counting() -> Json:
    tgi = Flavour.TGI
    return {
        "/tokenize": _post(
            "The tokens of a text", "TokenizeRequest", _json(_ref("TokenizeResponse")), tgi, _REFUSALS
        ),
        "/detokenize": _post(
            "The text of tokens", "DetokenizeRequest", _json(_ref("DetokenizeResponse")), tgi, _REFUSALS
        ),
        "/chat_tokenize": _post(
            "A chat as the model reads it", "ChatRequest", _json(_ref("ChatTokenizeResponse")), tgi, _REFUSALS
        ),
    }


def _operating(config: ServerConfig) -> Json:
    probes = {path: _probe("Whether requests are answered") for path in ("/health", "/ping")}
    text = {"text/plain": {"schema": {"type": "string"}}}
    paths: Json = {
        **probes,
        "/readyz": _probe("Whether requests are answered and the queue has room"),
        "/livez": _probe("Whether only a restart can help"),
        "/info": _get("What is served, and its limits", _json(_ref("Info"))),
        "/v1/models": _get("The models served", _json(_ref("ModelList"))),
        "/v1/models/{model}": _one_model(),
        "/openapi.json": _get("This document", _json({"type": "object"})),
        "/api-doc/openapi.json": _get("This document, where TGI has it", _json({"type": "object"})),
        "/docs": _get("This document for people", {"text/html": {"schema": {"type": "string"}}}),
    }
    if config.prometheus_port is None:
        paths["/metrics"] = _get("Prometheus metrics", text)
    return paths


def _post(
    summary: str, body: str, content: Json, flavour: Flavour, errors: tuple[ErrorKind, ...] = _FAILURES
) -> Json:
    responses: Json = {"200": {"description": "the answer", "content": content}}
    named = _json(_ref("Error" if flavour is Flavour.TGI else "OpenAIError"))
    for kind in errors:
        status, word = STATUS[kind][flavour]
        known = responses.setdefault(str(status), {"description": word, "content": named})
        if word not in known["description"]:
            known["description"] += f", {word}"
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(_ref(body))},
            "responses": dict(sorted(responses.items())),
        }
    }


def _get(summary: str, content: Json) -> Json:
    return {
        "get": {"summary": summary, "responses": {"200": {"description": "the answer", "content": content}}}
    }


def _one_model() -> Json:
    """Its name may hold slashes."""
    route = _get("One of the models served", _json(_ref("Model")))
    route["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    route["get"]["responses"]["404"] = {
        "description": "not_found_error",
        "content": _json(_ref("OpenAIError")),
    }
    return route


def _probe(summary: str) -> Json:
    failed = {"description": "no; the body says why", "content": _json(_ref("Error"))}
    return {
        "get": {
            "summary": summary,
            "security": [],
            "responses": {"200": {"description": "yes"}, "503": failed},
        }
    }


def _json(schema: Mapping[str, Any]) -> Json:
    return {"application/json": {"schema": dict(schema)}}


def _events(name: str) -> Json:
    """Server-sent events, each of which holds `name` as JSON; OpenAI's end with `[DONE]`."""
    return {"text/event-stream": {"schema": _ref(name)}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
