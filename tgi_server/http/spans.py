"""What is told to a tracer of one request; the tracer itself is an optional extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Spoken:
    """One request to generate that has been answered or refused. Times on the monotonic clock; never its words."""

    method: str
    route: str
    status: int  # of HTTP; 0: the client left before there was one
    request_id: str
    model: str
    headers: Mapping[str, str]
    began_s: float
    ended_s: float
    submitted_s: float | None  # to the engine, if it came so far
    queued_s: float
    first_token_s: float | None
    prompt_tokens: int
    generated_tokens: int
    failure: str  # why there was no whole answer; "" if there was

    def attributes(self) -> Iterator[tuple[str, str | int | float]]:
        """Under OpenTelemetry's names for HTTP and generative models, where it has one."""
        yield "http.request.method", self.method
        yield "http.route", self.route
        if self.status:
            yield "http.response.status_code", self.status
        yield "gen_ai.operation.name", "chat" if "chat" in self.route else "text_completion"
        yield "gen_ai.request.model", self.model
        yield "tgi.request_id", self.request_id
        if self.failure:
            yield "error.type", self.failure
        if self.submitted_s is not None:
            yield "gen_ai.usage.input_tokens", self.prompt_tokens
            yield "gen_ai.usage.output_tokens", self.generated_tokens
            yield "tgi.queue_duration_s", self.queued_s
        if self.first_token_s is not None:
            yield "tgi.time_to_first_token_s", self.first_token_s - self.began_s


class Tracer(Protocol):
    """Whoever wants to hear of requests that have ended."""

    def record(self, spoken: Spoken) -> None:
        """Called on the event loop: must return at once."""

    def close(self) -> None:
        """Send what is left; may take seconds."""
