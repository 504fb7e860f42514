"""The service's life: engine and front end start, serve, drain and end together."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import uvloop
from aiohttp import web

from tgi_server.config import EngineConfig, ServerConfig
from tgi_server.configure import check_checkpoint, configurations
from tgi_server.engine.launch import EngineProcess, start_engine
from tgi_server.errors import StartupError
from tgi_server.http.app import make_app, package_version
from tgi_server.http.ops import make_metrics_app
from tgi_server.http.spans import Tracer
from tgi_server.http.state import LIFE, METRICS, RENDERER
from tgi_server.http.transport import make_runner
from tgi_server.listening import Addresses, why_not
from tgi_server.logs import announce, logging_to_stderr
from tgi_server.process import age_s
from tgi_server.text.sample import sample_ids
from tgi_server.text.text import Text, doubts

_LAST_WORDS_S = 1.0  # how long clients get to read why their answers broke off
_LOOK_EVERY_S = 0.02
# Connections the kernel keeps until they are accepted. One more, and a client tries again only after a second.
_BACKLOG = 4096
_OWN_DESCRIPTORS = 32  # that the process needs beside those of clients

log = logging.getLogger("tgi_server")


def serve(values: Mapping[str, object], warnings: Sequence[str], addresses: Addresses) -> int:
    """Serve until told to stop; the exit status: 0, or 1 if the engine ended, or 128 + the signal of an abort.

    addresses: bound, not listening yet. Raises StartupError if the options do not fit the model or the machine.
    """
    with logging_to_stderr(str(values["log_level"]), as_json=values["json_output"] is True):
        for line in warnings:
            log.warning("%s", line)
        server, engine = configurations(values)
        check_checkpoint(values, engine)
        text = Text.from_folder(
            server.model, tokenizer_config=server.tokenizer_config, chat_template=server.chat_template
        )
        for line in doubts(text):
            log.warning("%s", line)
        if values["quality_check"] is True:
            engine = replace(engine, page_ids=sample_ids(text.tokenizer))
        return uvloop.run(_Service(server, engine, text, addresses).run())


class _Service:
    def __init__(
        self, config: ServerConfig, engine_config: EngineConfig, text: Text, addresses: Addresses
    ) -> None:
        self._config = config
        self._addresses = addresses
        self._engine_config = engine_config
        self._text = text
        self._signals: list[int] = []
        self._tls = _tls(config)
        self._tracer = _tracer(config)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.append, number)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            said = f"{signal.Signals(number).name} changes nothing; restart to read new options"
            loop.add_signal_handler(number, log.info, said)
        _allow_many_connections(self._config.max_queue)
        engine = await start_engine(self._engine_config)
        app = make_app(self._config, engine.client, self._text, tracer=self._tracer)
        runners = [make_runner(app)]
        if self._config.prometheus_port is not None:
            runners.append(web.AppRunner(make_metrics_app(app), access_log=None))
        try:
            await self._listen(runners)
            return await self._until_end(engine, app, runners[0])
        finally:
            for runner in runners:
                await runner.cleanup()
            await engine.stop()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    async def _listen(self, runners: Sequence[web.AppRunner]) -> None:
        groups = (self._addresses.service, self._addresses.metrics)
        for runner, sockets, tls in zip(runners, groups, (self._tls, None), strict=False):
            await runner.setup()
            for bound in sockets:
                try:
                    await web.SockSite(
                        runner, bound, shutdown_timeout=_LAST_WORDS_S, ssl_context=tls, backlog=_BACKLOG
                    ).start()
                except OSError as error:  # somebody who had bound it, too, was faster
                    host, port = bound.getsockname()[:2]
                    raise why_not(host, port, "port", error) from None

    async def _until_end(self, engine: EngineProcess, app: web.Application, runner: web.AppRunner) -> int:
        """Announce readiness; serve until a signal or the engine's end; let running requests finish."""
        announcing = asyncio.create_task(self._announce(engine, app, runner))
        await _until(lambda: bool(self._signals) or engine.ended.done())
        announcing.cancel()
        if not engine.ended.done():
            await self._drain(engine, app)
        if engine.ended.done() and not (self._signals and not app[METRICS].active):
            log.error("%s; the service ends", engine.last_words)
            await asyncio.sleep(_LAST_WORDS_S)
            return 1
        return 128 + self._signals[1] if len(self._signals) > 1 else 0

    async def _drain(self, engine: EngineProcess, app: web.Application) -> None:
        metrics, grace_s = app[METRICS], self._config.grace_s
        app[LIFE].draining = True
        log.info("stopping: %d requests may finish within %g s", metrics.active, grace_s)
        finished = await _until(
            lambda: not metrics.active or len(self._signals) > 1 or engine.ended.done(), grace_s
        )
        if engine.ended.done():
            return
        if metrics.active:
            why = "a second signal came" if finished else f"{grace_s:g} s have passed"
            log.warning("%s: %d requests are broken off", why, metrics.active)
            engine.client.mark_dead("the server is stopping")
            await _until(lambda: not metrics.active, _LAST_WORDS_S)

    async def _announce(self, engine: EngineProcess, app: web.Application, runner: web.AppRunner) -> None:
        if RENDERER in app:
            await app[RENDERER].start()
        if not await engine.client.wait_ready():
            return
        log.info("ready %.1f s after the start", age_s())
        address = runner.addresses[0]
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        url = f"{'https' if self._tls else 'http'}://{host}:{address[1]}"
        body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
        announce(
            f"{self._config.model_id} is ready on {url}\nTry: curl {url}/v1/chat/completions "
            f"-H 'Content-Type: application/json' -d '{body}'"
        )


def _allow_many_connections(max_queue: int) -> None:
    """Each takes a file descriptor, and the usual soft limit of 1024 is meant for programs that use select."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.info("at most %d files and connections may be open at a time", hard)
    if hard != resource.RLIM_INFINITY and hard < max_queue + _OWN_DESCRIPTORS:
        log.warning(
            "the limit of open files is %d: more than %d clients at once will be turned away, though --max-queue is "
            "%d; raise it (ulimit -n)", hard, max(0, hard - _OWN_DESCRIPTORS), max_queue,
        )  # fmt: skip


def _tracer(config: ServerConfig) -> Tracer | None:
    if config.otlp_endpoint is None:
        return None
    try:
        # An extra that few install, and half a second of imports.
        from tgi_server.tracing import open_traces, protocol_of  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--otlp-endpoint needs the package {error.name}: pip install 'tgi-server[otel]', or leave it out"
        ) from None
    endpoint = config.otlp_endpoint
    log.info("traces go to %s over %s", endpoint, protocol_of(endpoint))
    return open_traces(endpoint, config.otlp_service_name, package_version())


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        if config.ssl_keyfile is not None:
            raise StartupError("--ssl-keyfile needs --ssl-certfile beside it")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise StartupError(f"--ssl-certfile {config.ssl_certfile} cannot be used: {error}") from None
    return context


async def _until(condition: Callable[[], bool], within_s: float = float("inf")) -> bool:
    """Wait for it; whether it came in time."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + within_s
    while not condition():
        if loop.time() >= deadline_s:
            return False
        await asyncio.sleep(_LOOK_EVERY_S)
    return True
