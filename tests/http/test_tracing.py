"""Traces of requests: what spans say, that both protocols reach a collector, that one that is gone does no harm."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine
from tests.http.test_streams import until
from tests.server import running_server
from tgi_server.errors import ErrorKind, StartupError, UserError
from tgi_server.http.spans import Spoken
from tgi_server.service import _tracer

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as wire
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tgi_server.tracing import Traces, open_traces, protocol_of, traces_url

Say = Callable[..., FakeEngine]
TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"messages": [{"role": "user", "content": "a secret"}]}


class Recorded:
    """A tracer and the spans it has made, by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.traces = Traces(self._exporter, "a service", "1.2.3")

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        self.traces._provider.force_flush()
        return {span.name: span for span in self._exporter.get_finished_spans()}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_a_request_is_a_span_and_its_phases_fill_it(start: Start, say: Say) -> None:
    recorded = Recorded()
    client = await start(say("hello", delay_s=0.01), tracer=recorded.traces)
    before = time.time()
    answer = await client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"})
    usage = (await answer.json())["usage"]
    spans = recorded.spans
    assert set(spans) == {"POST /v1/chat/completions", "validate", "queue", "prefill", "decode"}
    root = spans["POST /v1/chat/completions"]
    assert root.kind.name == "SERVER" and root.parent is None and root.status.is_ok is not False
    assert root.attributes is not None
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "tgi.request_id": "mine",
    }
    assert expected.items() <= dict(root.attributes).items()
    assert dict(root.resource.attributes)["service.name"] == "a service"
    order = [spans[name] for name in ("validate", "queue", "prefill", "decode")]
    assert all(one.parent and one.parent.span_id == root.context.span_id for one in order)
    assert order[0].start_time == root.start_time and order[-1].end_time == root.end_time
    for earlier, later in pairwise(order):
        assert earlier.end_time == later.start_time
    assert seconds(spans["queue"]) == pytest.approx(0.002, abs=1e-5), "what the engine said it waited"
    assert seconds(spans["decode"]) >= 0.01
    assert root.start_time is not None and before - 1 < root.start_time / 1e9 < before + 1
    assert "secret" not in "".join(span.to_json() for span in spans.values())


@pytest.mark.parametrize(("flags", "is_told"), [("01", True), ("00", False)])
async def test_the_callers_traceparent_is_honoured(start: Start, say: Say, flags: str, is_told: bool) -> None:
    recorded = Recorded()
    client = await start(say("hello"), tracer=recorded.traces)
    headers = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-{flags}"}
    assert (await client.post("/generate", json={"inputs": "x"}, headers=headers)).status == 200
    spans = recorded.spans
    assert bool(spans) is is_told, "a caller that does not sample is not traced"
    if is_told:
        root = spans["POST /generate"]
        assert root.parent is not None and f"{root.parent.span_id:016x}" == CALLER_ID
        assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}


@pytest.mark.parametrize("value", ["", "junk", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff" * 200, "00--"])
async def test_a_bad_traceparent_starts_a_trace_of_its_own(start: Start, say: Say, value: str) -> None:
    recorded = Recorded()
    client = await start(say("hello"), tracer=recorded.traces)
    answer = await client.post("/generate", json={"inputs": "x"}, headers={"traceparent": value})
    assert answer.status == 200
    assert recorded.spans["POST /generate"].parent is None


async def test_failures_are_errors_with_their_kind_and_the_phases_they_came_to(
    start: Start, say: Say
) -> None:
    recorded = Recorded()
    broken = UserError(ErrorKind.GENERATION, "no")
    client = await start(say("hello", fail_at=0, failure=broken), tracer=recorded.traces)
    assert (await client.post("/generate", json={"inputs": "x"})).status == 424
    assert (await client.post("/generate_stream", json={"inputs": 3})).status == 422
    spans = recorded.spans
    for name, kind, status in (
        ("POST /generate", "generation", 424),
        ("POST /generate_stream", "invalid", 422),
    ):
        attributes = dict(spans[name].attributes or {})
        assert not spans[name].status.is_ok
        assert (attributes["error.type"], attributes["http.response.status_code"]) == (kind, status)
    assert "prefill" not in spans and "decode" not in spans


async def test_a_client_that_leaves_is_a_span_that_says_so(start: Start, say: Say) -> None:
    recorded = Recorded()
    engine = say("a b c d e", stall_at=2)
    client = await start(engine, tracer=recorded.traces)
    response = await client.post("/generate_stream", json={"inputs": "x"})
    response.close()
    await until(lambda: "POST /generate_stream" in recorded.spans)
    attributes = recorded.spans["POST /generate_stream"].attributes
    assert attributes is not None and attributes["error.type"] == "dropped"


async def test_probes_and_scrapes_are_not_traced(start: Start, say: Say) -> None:
    recorded = Recorded()
    client = await start(say("hello"), tracer=recorded.traces)
    for path in ("/health", "/metrics", "/info", "/v1/models"):
        await client.get(path)
    assert not recorded.spans


def spoken(**changes: Any) -> Spoken:
    now = time.monotonic()
    about: dict[str, Any] = {
        "method": "POST", "route": "/generate", "status": 200, "request_id": "r", "model": "m", "headers": {},
        "began_s": now, "ended_s": now + 1, "submitted_s": now, "queued_s": 0.0, "first_token_s": now,
        "prompt_tokens": 3, "generated_tokens": 4, "failure": "",
    }  # fmt: skip
    return Spoken(**{**about, **changes})


def names_sent(messages: list[bytes]) -> list[str]:
    """The service and the names of the spans in what a collector got."""
    found = []
    for message in messages:
        for resource in wire.ExportTraceServiceRequest.FromString(message).resource_spans:
            (service,) = [
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            ]
            found += [f"{service}: {span.name}" for scope in resource.scope_spans for span in scope.spans]
    return found


SENT = {f"svc: {name}" for name in ("POST /generate", "validate", "queue", "prefill", "decode")}


async def test_spans_reach_a_collector_over_http() -> None:
    got: list[bytes] = []

    async def collect(request: web.Request) -> web.Response:
        assert request.headers["Content-Type"] == "application/x-protobuf"
        got.append(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    async with TestServer(app, port=0) as server:
        traces = open_traces(f"http://127.0.0.1:{server.port}/v1/traces", "svc", "1")
        traces.record(spoken())
        await asyncio.to_thread(traces.close)
    assert set(names_sent(got)) == SENT


class Collector(TraceServiceServicer):
    def __init__(self) -> None:
        self.got: list[bytes] = []

    def Export(self, request: Any, context: object) -> object:
        del context
        self.got.append(request.SerializeToString())
        return wire.ExportTraceServiceResponse()


@contextmanager
def grpc_collector() -> Iterator[tuple[Collector, str]]:
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_spans_reach_a_collector_over_grpc() -> None:
    with grpc_collector() as (collector, endpoint):
        traces = open_traces(endpoint, "svc", "1")
        traces.record(spoken())
        traces.close()
    assert set(names_sent(collector.got)) == SENT


@pytest.mark.parametrize(
    ("endpoint", "protocol"),
    [
        ("http://otel:4317", "gRPC"),
        ("https://otel:4317", "gRPC"),
        ("http://otel:4318", "HTTP"),
        ("http://otel:4318/v1/traces", "HTTP"),
        ("https://otel.example.com/otlp/v1/traces", "HTTP"),
        ("http://otel:55680", "gRPC"),
    ],
)
def test_the_port_or_a_path_says_which_protocol_is_spoken(endpoint: str, protocol: str) -> None:
    assert protocol_of(endpoint) == protocol


@pytest.mark.parametrize("endpoint", ["http://otel:4318", "http://otel:4318/", "http://otel:4318/v1/traces"])
def test_a_bare_address_gets_the_protocols_path(endpoint: str) -> None:
    assert traces_url(endpoint) == "http://otel:4318/v1/traces"


def test_a_real_server_traces_and_one_whose_collector_is_gone_serves_and_ends_all_the_same() -> None:
    body: Mapping[str, object] = {"inputs": "Once", "parameters": {"max_new_tokens": 2}}
    with grpc_collector() as (collector, endpoint):
        options = ("--otlp-endpoint", endpoint, "--otlp-service-name", "svc")
        with running_server(*options) as server:
            server.post("/generate", body)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=30) == 0
        assert set(names_sent(collector.got)) == SENT, "the end sends what waits"
    with running_server("--otlp-endpoint", "http://127.0.0.1:9") as server:
        for _ in range(3):
            server.post("/generate", body)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0
        assert "Traceback" not in server.log


def test_nothing_of_opentelemetry_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, tgi_server.service, tgi_server.http.app\n"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry', 'grpc'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_the_start_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tgi_server.tracing", None)
    config: Any = type("Config", (), {"otlp_endpoint": "http://127.0.0.1:4317"})
    with pytest.raises(StartupError, match=r"pip install 'tgi-server\[otel\]'"):
        _tracer(config)
