"""For operators and their probes: health, readiness, what is served."""

from __future__ import annotations

import msgspec
from aiohttp import web

from tgi_server.config import ServerConfig
from tgi_server.http.answers import json_response
from tgi_server.http.openai import unknown_model
from tgi_server.http.prometheus import CONTENT_TYPE
from tgi_server.http.prompt import most_input_tokens
from tgi_server.http.state import CONFIG, ENGINE, LIFE, METRICS, VERSION, Engine, Life

_READY_HEARTBEAT_S = 5.0
_LIVE_HEARTBEAT_S = 30.0  # a step may be slow; one that takes this long will not end


async def get_ready(request: web.Request) -> web.Response:
    """200 if a request sent now would be answered, else 503 and why not."""
    return _verdict(_why_not_ready(request.app[ENGINE], request.app[LIFE]))


async def get_ready_for_more(request: web.Request) -> web.Response:
    """As `get_ready`, and 503 while the queue is full: a balancer should send requests elsewhere.

    `/health` does not say so: who takes it for a sign of life would restart a server that is only busy.
    """
    engine, most = request.app[ENGINE], request.app[CONFIG].max_queue
    trouble = _why_not_ready(engine, request.app[LIFE])
    if trouble is None and engine.status.waiting + engine.status.running >= most:
        trouble = f"the queue is full: {most} requests are waiting or running"
    return _verdict(trouble)


async def get_live(request: web.Request) -> web.Response:
    """503 if only a restart can help: the engine is gone, or has not moved for half a minute."""
    engine = request.app[ENGINE]
    if not engine.alive:
        return _verdict(_why_not_ready(engine, request.app[LIFE]))
    age_s = engine.heartbeat_age_s()
    stuck = engine.status.phase == "ready" and age_s > _LIVE_HEARTBEAT_S
    return _verdict(f"the engine has been silent for {age_s:.1f} s" if stuck else None)


async def get_info(request: web.Request) -> web.Response:
    config = request.app[CONFIG]
    status = msgspec.structs.asdict(request.app[ENGINE].status)
    return json_response(
        {
            "model_id": config.model_id,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": config.max_queue,
            "max_best_of": config.max_best_of,
            "max_stop_sequences": config.max_stop_sequences,
            "max_input_tokens": most_input_tokens(config),
            "max_total_tokens": config.max_total_tokens,
            "validation_workers": 1,
            "max_client_batch_size": config.max_client_batch_size,
            "router": "tgi-server",
            "version": request.app[VERSION],
            "sha": None,
            "docker_label": None,
            # Histograms are for `/metrics`.
            "engine": {name: value for name, value in status.items() if not isinstance(value, list)},
        }
    )


async def get_models(request: web.Request) -> web.Response:
    return json_response({"object": "list", "data": [_model(request.app[CONFIG])]})


async def get_model(request: web.Request) -> web.Response:
    config, name = request.app[CONFIG], request.match_info["model"]
    if name != config.model_id:
        raise unknown_model(config, name)
    return json_response(_model(config))


async def get_metrics(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    text = request.app[METRICS].text(engine.status, alive=engine.alive, version=request.app[VERSION])
    return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})


def _model(config: ServerConfig) -> dict[str, object]:
    return {"id": config.model_id, "object": "model", "created": 0, "owned_by": config.model_id}


def make_metrics_app(app: web.Application) -> web.Application:
    """The metrics of `app` alone, for a port of their own."""
    alone = web.Application()
    alone[ENGINE] = app[ENGINE]
    alone[METRICS] = app[METRICS]
    alone[VERSION] = app[VERSION]
    alone.router.add_get("/metrics", get_metrics)
    return alone


def _why_not_ready(engine: Engine, life: Life) -> str | None:
    if life.draining and engine.alive:
        return "the server is stopping"
    status = engine.status
    if not engine.alive or status.phase != "ready":
        phase = status.phase if engine.alive or status.phase != "ready" else "gone"
        return f"the engine is {phase}" + (f": {status.detail}" if status.detail else "")
    age_s = engine.heartbeat_age_s()
    return f"the engine has been silent for {age_s:.1f} s" if age_s >= _READY_HEARTBEAT_S else None


def _verdict(trouble: str | None) -> web.Response:
    if trouble is None:
        return web.Response()
    return json_response({"error": trouble, "error_type": "healthcheck"}, status=503)
