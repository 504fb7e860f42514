"""What operators count: TGI's metrics under TGI's names, and those it lacked. Each request is counted once."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import chain

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.request import (
    STEP_BOUNDS_S,
    STEP_SIZE_BOUNDS,
    EngineStatus,
    GenerationRequest,
    TokenEvent,
)
from tgi_server.errors import ErrorKind
from tgi_server.http.prometheus import (
    Counter,
    Histogram,
    counter,
    gauge,
    histogram,
    linear,
)

# The routes whose requests are counted.
GENERATING = frozenset(
    (
        "/", "/generate", "/generate_stream", "/invocations", "/vertex",
        "/v1/chat/completions", "/v1/completions",
    )
)  # fmt: skip

_FAILURES = {
    ErrorKind.OVERLOADED: "overloaded",
    ErrorKind.WAITED: "timeout",
    ErrorKind.GENERATION: "generation",
    ErrorKind.INCOMPLETE: "incomplete",
    ErrorKind.TEMPLATE: "template",
    ErrorKind.UNAVAILABLE: "unavailable",
    ErrorKind.INTERNAL: "internal",
    ErrorKind.UNAUTHORIZED: "unauthorized",
    ErrorKind.FORBIDDEN: "unauthorized",
}
_REJECTIONS = (ErrorKind.OVERLOADED, ErrorKind.WAITED, ErrorKind.UNAVAILABLE)


class Metrics:
    """All that this front end has counted since it started."""

    def __init__(self, max_total_tokens: int) -> None:
        def seconds(name: str, help: str) -> Histogram:
            return Histogram(name, f"{help}, in seconds.", STEP_BOUNDS_S)

        def tokens(name: str, help: str, last: int) -> Histogram:
            return Histogram(name, help, linear(last, 100))

        self.active = 0  # requests being answered
        self.count = Counter("tgi_request_count", "Requests to generate.")
        self.success = Counter("tgi_request_success", "Requests answered to the end.")
        self.failure = Counter(
            "tgi_request_failure",
            "Requests not answered to the end, by cause.",
            "err",
            sorted({*_FAILURES.values(), "validation", "dropped"}),
        )
        self.aborts = Counter("tgi_request_aborts_total", "Requests whose client left before the end.")
        self.rejections = Counter(
            "tgi_request_rejections_total",
            "Requests refused: the queue was full, the wait too long, or the engine not ready.",
            "reason",
            sorted(_FAILURES[kind] for kind in _REJECTIONS),
        )
        self.prompt_tokens = Counter("tgi_prompt_tokens_total", "Tokens of the prompts sent to the engine.")
        self.generated = Counter("tgi_generated_tokens_total", "Tokens generated.")
        self.duration = seconds("tgi_request_duration", "From a request's headers to its answer's end")
        self.validation = seconds(
            "tgi_request_validation_duration", "Reading, checking and encoding a request"
        )
        self.queue = seconds("tgi_request_queue_duration", "From the engine's queue to the first step")
        self.inference = seconds("tgi_request_inference_duration", "From the first step to the end")
        self.per_token = seconds(
            "tgi_request_mean_time_per_token_duration", "Inference of a request by its tokens"
        )
        self.first_token = seconds(
            "tgi_time_to_first_token_seconds", "From a request's headers to its first token"
        )
        self.between = seconds("tgi_inter_token_latency_seconds", "Between two tokens of an answer")
        self.input_length = tokens("tgi_request_input_length", "Tokens of a prompt.", max_total_tokens)
        self.max_new = tokens("tgi_request_max_new_tokens", "Tokens an answer may have.", max_total_tokens)
        self.generated_tokens = tokens(
            "tgi_request_generated_tokens", "Tokens generated for a request.", max_total_tokens
        )

    def text(self, status: EngineStatus, *, alive: bool, version: str) -> str:
        """Everything in Prometheus' text format."""
        own = (one.lines() for one in vars(self).values() if isinstance(one, (Counter, Histogram)))
        build = (
            "# HELP tgi_build_info Always 1.\n# TYPE tgi_build_info gauge",
            f'tgi_build_info{{version="{version}"}} 1',
        )
        lines = chain(
            build,
            gauge("tgi_requests_active", "Requests being answered.", self.active),
            *own,
            _of_engine(status, alive=alive),
        )
        return "\n".join(lines) + "\n"


class Turn:
    """One HTTP request, from its headers to its answer's end: what is to be counted and logged of it."""

    def __init__(self, metrics: Metrics, *, counted: bool) -> None:
        self.began_s = time.monotonic()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.first_token_s: float | None = None  # since `began_s`
        self.error: ErrorKind | None = None  # why it failed, if it did
        self.dropped = False  # the client left
        self.counted = counted  # whether it is one to generate
        self.submitted_s: float | None = None  # when the engine got it
        self.queued_s = 0.0
        self._metrics = metrics
        if counted:
            metrics.count.add()
            metrics.active += 1

    def answer(self, request: GenerationRequest) -> Answer:
        """One of the answers this request asks the engine for is about to begin."""
        metrics = self._metrics
        if self.submitted_s is None:
            self.submitted_s = time.monotonic()
            metrics.validation.observe(self.submitted_s - self.began_s)
            metrics.max_new.observe(request.max_new_tokens)
            metrics.input_length.observe(len(request.prompt_ids))
        self.prompt_tokens += len(request.prompt_ids)
        metrics.prompt_tokens.add(len(request.prompt_ids))
        return Answer(self, metrics)

    def was_queued(self, queued_s: float | None) -> None:
        self.queued_s = max(self.queued_s, queued_s or 0.0)

    def end(self) -> None:
        """Count the request. To be called once, when nothing more will be sent."""
        if not self.counted:
            return
        metrics = self._metrics
        metrics.active -= 1
        if self.dropped:
            metrics.aborts.add()
            metrics.failure.add(value="dropped")
        elif self.error is not None:
            metrics.failure.add(value=_FAILURES.get(self.error, "validation"))
            if self.error in _REJECTIONS and not self.generated_tokens:
                metrics.rejections.add(value=_FAILURES[self.error])
        else:
            self._succeed(metrics)

    def _succeed(self, metrics: Metrics) -> None:
        now_s = time.monotonic()
        metrics.success.add()
        metrics.duration.observe(now_s - self.began_s)
        if self.submitted_s is None:
            return
        inference_s = max(0.0, now_s - self.submitted_s - self.queued_s)
        metrics.queue.observe(self.queued_s)
        metrics.inference.observe(inference_s)
        metrics.generated_tokens.observe(self.generated_tokens)
        if self.generated_tokens:
            metrics.per_token.observe(inference_s / self.generated_tokens)


class Answer:
    """One sequence of tokens on its way to a client."""

    __slots__ = ("_last_s", "_metrics", "_turn")

    def __init__(self, turn: Turn, metrics: Metrics) -> None:
        self._turn = turn
        self._metrics = metrics
        self._last_s: float | None = None

    def saw(self, event: TokenEvent) -> None:
        """Tokens have come; those of one event share the time since the last."""
        count = len(event.token_ids)
        if not count:
            return
        now_s = time.monotonic()
        turn = self._turn
        turn.generated_tokens += count
        self._metrics.generated.add(count)
        if self._last_s is not None:
            self._metrics.between.observe((now_s - self._last_s) / count, count)
        else:
            turn.was_queued(event.queued_s)
            if turn.first_token_s is None:
                turn.first_token_s = now_s - turn.began_s
                self._metrics.first_token.observe(turn.first_token_s)
        self._last_s = now_s


def _of_engine(status: EngineStatus, *, alive: bool) -> Iterable[str]:
    """What the engine said last. Its steps may mix prompts and answers; one with prompt tokens is a prefill."""
    used = status.total_pages - status.free_pages
    steps = {"prefill": status.prefill_steps, "decode": status.decode_steps}
    failed = {"prefill": status.failed_prefill_steps, "decode": status.failed_decode_steps}
    seconds = {
        "prefill": (status.prefill_s, status.prefill_step_buckets),
        "decode": (status.decode_s, status.decode_step_buckets),
    }
    yield from gauge("tgi_engine_up", "Whether the engine serves.", int(alive and status.phase == "ready"))
    yield from gauge("tgi_queue_size", "Requests waiting in the engine.", status.waiting)
    yield from gauge("tgi_batch_current_size", "Sequences the engine works on.", status.running)
    yield from gauge(
        "tgi_batch_current_max_tokens", "Tokens of KV cache in use by sequences.", used * PAGE_TOKENS
    )
    yield from gauge(
        "tgi_batch_max_total_tokens", "Tokens the KV cache can hold.", status.total_pages * PAGE_TOKENS
    )
    yield from gauge(
        "tgi_kv_cache_usage_ratio", "KV cache in use by sequences, 0 to 1.", used / max(status.total_pages, 1)
    )
    yield from counter("tgi_prefix_cache_queried_tokens_total", "Prompt tokens begun.", status.prompt_tokens)
    yield from counter(
        "tgi_prefix_cache_hit_tokens_total", "Prompt tokens found in the cache.", status.prefix_hit_tokens
    )
    yield from counter(
        "tgi_preemptions_total", "Sequences put back into the queue for want of memory.", status.preemptions
    )
    begun = {method: steps[method] + failed[method] for method in steps}
    yield from counter("tgi_batch_inference_count", "Steps computed or failed.", begun, "method")
    yield from counter("tgi_batch_inference_success", "Steps computed without failure.", steps, "method")
    yield from counter("tgi_batch_inference_failure", "Steps that failed.", failed, "method")
    # Forward pass and sampling are queued as one: TGI's two histograms of them are the same here.
    for name in ("inference", "forward"):
        yield from histogram(
            f"tgi_batch_{name}_duration", "A step, in seconds.", STEP_BOUNDS_S, seconds, "method"
        )
    sizes = {"": (status.stepped_sequences, status.step_size_buckets)}
    yield from histogram("tgi_batch_next_size", "Sequences of a step.", STEP_SIZE_BOUNDS, sizes)
