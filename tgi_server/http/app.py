"""The application: which handler answers which route."""

from __future__ import annotations

from importlib import metadata

from aiohttp import web
from aiohttp.typedefs import Handler

from tgi_server.config import ServerConfig
from tgi_server.engine.request import HONOURED as HONOURED_BY_ENGINE
from tgi_server.http.body import wait_for_invitation
from tgi_server.http.chat import post_chat
from tgi_server.http.completions import post_completions
from tgi_server.http.cors import answer_preflights, name_origin
from tgi_server.http.docs import get_docs, get_openapi
from tgi_server.http.generate import post_compat, post_generate, post_generate_stream
from tgi_server.http.keys import Keys, check_key
from tgi_server.http.metrics import Metrics
from tgi_server.http.middleware import echo_request_id, guard
from tgi_server.http.ops import (
    get_info,
    get_live,
    get_metrics,
    get_model,
    get_models,
    get_ready,
    get_ready_for_more,
)
from tgi_server.http.platforms import post_invocations, post_vertex
from tgi_server.http.spans import Tracer
from tgi_server.http.state import (
    CONFIG,
    ENGINE,
    HONOURED,
    LIFE,
    METRICS,
    PATIENCE,
    RENDERER,
    TEXT,
    THREADS,
    TRACER,
    VERSION,
    Engine,
    Life,
    Patience,
)
from tgi_server.http.threads import Threads
from tgi_server.http.tokenize import post_chat_tokenize, post_detokenize, post_tokenize
from tgi_server.text.renderer import Renderer
from tgi_server.text.text import Text


def _post(path: str, handler: Handler) -> web.RouteDef:
    return web.post(path, handler, expect_handler=wait_for_invitation)


_ROUTES = (
    _post("/generate", post_generate),
    _post("/generate_stream", post_generate_stream),
    _post("/", post_compat),
    _post("/v1/chat/completions", post_chat),
    _post("/v1/completions", post_completions),
    _post("/tokenize", post_tokenize),
    _post("/detokenize", post_detokenize),
    _post("/chat_tokenize", post_chat_tokenize),
    _post("/invocations", post_invocations),
    _post("/vertex", post_vertex),
    web.get("/v1/models", get_models),
    web.get("/v1/models/{model:.+}", get_model),
    web.get("/info", get_info),
    web.get("/", get_ready),
    web.get("/health", get_ready),
    web.get("/ping", get_ready),
    web.get("/readyz", get_ready_for_more),
    web.get("/livez", get_live),
    web.get("/openapi.json", get_openapi),
    web.get("/api-doc/openapi.json", get_openapi),
    web.get("/docs", get_docs),
)


def make_app(
    config: ServerConfig,
    engine: Engine,
    text: Text,
    *,
    patience: Patience | None = None,
    honoured: frozenset[str] = HONOURED_BY_ENGINE,
    tracer: Tracer | None = None,
) -> web.Application:
    """Run it with `handler_cancellation=True`: a client that leaves must cancel its request.

    honoured: the request fields the engine acts on; others are refused by name.
    """
    app = web.Application(
        middlewares=[
            guard,
            answer_preflights(config.cors_allow_origin),
            check_key(Keys(config.api_keys, config.admin_keys)),
        ],
        client_max_size=config.payload_limit_bytes,
    )
    app[CONFIG] = config
    app[ENGINE] = engine
    app[TEXT] = text
    app[PATIENCE] = patience or Patience()
    app[HONOURED] = honoured
    app[METRICS] = Metrics(config.max_total_tokens)
    app[LIFE] = Life()
    app[THREADS] = Threads(config.max_queue)
    app.on_cleanup.append(_close_threads)
    if tracer is not None:
        app[TRACER] = tracer
    if text.template is not None:
        app[RENDERER] = Renderer(text.template)
        app.on_cleanup.append(_close_renderer)
    app[VERSION] = package_version()
    app.on_response_prepare.append(echo_request_id)
    if config.cors_allow_origin:
        app.on_response_prepare.append(name_origin)
    app.router.add_routes(_ROUTES)
    if config.prometheus_port is None:
        app.router.add_get("/metrics", get_metrics)
    return app


async def _close_threads(app: web.Application) -> None:
    app[THREADS].close()


async def _close_renderer(app: web.Application) -> None:
    await app[RENDERER].close()


def package_version() -> str:
    try:
        return metadata.version("tgi-server")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unreleased"
