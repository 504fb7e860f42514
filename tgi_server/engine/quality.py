"""Does the model that was loaded know language? A look at one page of text, before anything is served."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tgi_server.config import EngineConfig
from tgi_server.engine.engine import Engine, Runner
from tgi_server.engine.request import (
    FromEngine,
    GenerationRequest,
    StepEvents,
    ToEngine,
    TokenEvent,
)
from tgi_server.errors import StartupError


@dataclass(frozen=True)
class PageQuality:
    """How well each token of a page was foretold by those before it."""

    logprobs: Sequence[float]
    by_frequency: float  # perplexity of one who knows how often each token is on this page, and nothing else

    @property
    def perplexity(self) -> float:
        """Infinite if a probability is none or no number."""
        mean = -math.fsum(self.logprobs) / len(self.logprobs)
        return math.exp(mean) if mean < 700 else math.inf

    def require_language(self) -> None:
        """Raise StartupError if the page was foretold no better than by frequencies.

        These are of the page itself, which no model can know: whatever has learnt a language that is on it stays far
        below. A model that is merely worse than it was passes; `tgi-server eval --against` finds that.
        """
        odd = sum(not math.isfinite(logprob) for logprob in self.logprobs)
        if odd:
            raise StartupError(
                f"--quality-check: {odd} of {len(self.logprobs)} log-probabilities on a page of plain English are not "
                "finite: the weights are damaged, or overflow the type that is computed in. Take another checkpoint "
                "or --dtype, or leave the option out to serve it all the same"
            )
        if self.perplexity > self.by_frequency:
            raise StartupError(
                f"--quality-check: the model is garbled. Its perplexity on a page of plain English is "
                f"{self.perplexity:.1f}; counting how often each of the {len(self.logprobs)} tokens occurs gives "
                f"{self.by_frequency:.1f}. Weights, scales or the tokenizer do not belong together; take another "
                "checkpoint, or leave the option out to serve it all the same"
            )


def read_page(config: EngineConfig, runner: Runner, ids: Sequence[int]) -> PageQuality:
    """Let the engine that will serve score the page. ids: two tokens at least; what is too long is cut off.

    Raises StartupError if it cannot be computed.
    """
    ids = list(ids[: config.max_total_tokens - 1])
    wire = _Wire(
        [GenerationRequest(id="quality check", prompt_ids=ids, max_new_tokens=1, prompt_logprobs=True)]
    )
    engine = Engine(replace(config, queue_timeout_s=0.0), runner, wire)
    while not wire.finished:
        engine.step()
    logprobs = [logprob for event in wire.events for logprob in event.prompt_logprobs]
    if not logprobs:
        raise StartupError(f"--quality-check: a page of text could not be computed: {wire.events[-1].error}")
    return PageQuality(logprobs, perplexity_by_frequency(ids[1:]))


def perplexity_by_frequency(ids: Sequence[int]) -> float:
    """Of the tokens under the distribution that they themselves have."""
    shares = [count / len(ids) for count in Counter(ids).values()]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


class _Wire:
    """One request, and what is said of it."""

    def __init__(self, requests: list[ToEngine]) -> None:
        self._waiting = requests
        self.events: list[TokenEvent] = []

    @property
    def finished(self) -> bool:
        return any(event.finish is not None for event in self.events)

    def receive(self, timeout_s: float) -> list[ToEngine]:  # noqa: ARG002
        taken, self._waiting = self._waiting, []
        return taken

    def send(self, message: FromEngine) -> None:
        if isinstance(message, StepEvents):
            self.events += message.events
