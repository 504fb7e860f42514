"""Traces to an OpenTelemetry collector: one span a request, and under it validate, queue, prefill and decode.

Imported only if a collector is named. Spans are made when a request has ended, from the times that were taken for
the log anyway, and sent by a thread: nothing is done while tokens come, and a collector that is slow or gone costs
spans, never answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tgi_server.http.spans import Spoken

_SEND_S = 5.0  # how long the collector may take to answer
_LAST_SPANS_S = 2.0  # how long the end of the service waits for the last ones
_GRPC_PORT = 4317


class Traces:
    """Records requests; `close` sends what is left."""

    def __init__(self, exporter: SpanExporter, service: str, version: str) -> None:
        resource = Resource.create({SERVICE_NAME: service, SERVICE_VERSION: version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tgi_server", version)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, spoken: Spoken) -> None:
        """One span for the request, a child of the caller's if its `traceparent` says so and is sampled."""
        # Python's two clocks have no common zero: what is known of one moment places all others.
        offset_ns = time.time_ns() - time.monotonic_ns()

        def wall_ns(monotonic_s: float) -> int:
            return int(monotonic_s * 1e9) + offset_ns

        caller = self._propagator.extract(spoken.headers)
        name = f"{spoken.method} {spoken.route}"
        began, ended = wall_ns(spoken.began_s), wall_ns(spoken.ended_s)
        root = self._tracer.start_span(
            name, caller, SpanKind.SERVER, dict(spoken.attributes()), start_time=began
        )
        if spoken.failure:
            root.set_status(Status(StatusCode.ERROR, spoken.failure))
        inside = set_span_in_context(root)
        for phase, start_s, end_s in _phases(spoken):
            child = self._tracer.start_span(phase, inside, start_time=wall_ns(start_s))
            child.end(wall_ns(end_s))
        root.end(ended)

    def close(self) -> None:
        """Send what waits; gives up after two seconds. Call it off the event loop."""
        sending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_S)


def open_traces(endpoint: str, service: str, version: str) -> Traces:
    """endpoint: as `flags.collector` accepts it; `protocol_of` says what is spoken there."""
    exporter: SpanExporter
    if protocol_of(endpoint) == "gRPC":
        exporter = GrpcExporter(
            endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=int(_SEND_S)
        )
    else:
        exporter = HttpExporter(endpoint=traces_url(endpoint), timeout=int(_SEND_S))
    return Traces(exporter, service, version)


def protocol_of(endpoint: str) -> str:
    """gRPC on its own port, as TGI speaks it, and on any other that is given without a path but 4318."""
    parts = urlsplit(endpoint)
    if parts.port == _GRPC_PORT:
        return "gRPC"
    return "HTTP" if parts.port == _GRPC_PORT + 1 or parts.path not in ("", "/") else "gRPC"


def traces_url(endpoint: str) -> str:
    """Where HTTP sends traces: a collector's bare address gets the path that the protocol prescribes."""
    return endpoint if urlsplit(endpoint).path not in ("", "/") else endpoint.rstrip("/") + "/v1/traces"


def _phases(spoken: Spoken) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of each phase the request came to; they follow each other without a gap."""
    submitted, ended = spoken.submitted_s, spoken.ended_s
    if submitted is None:
        yield "validate", spoken.began_s, ended
        return
    yield "validate", spoken.began_s, submitted
    first = spoken.first_token_s
    if first is None:
        yield "queue", submitted, ended
        return
    begun = min(submitted + spoken.queued_s, first)
    yield "queue", submitted, begun
    yield "prefill", begun, first
    yield "decode", first, ended
