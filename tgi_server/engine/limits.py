"""How much a scheduler takes on. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    max_batch_tokens: int  # tokens a step computes; at least max_sequences, so that decoding never waits
    max_sequences: int
    max_queue: int  # requests waiting or running
    target_s: float = 0.1  # wished time between two tokens of a stream while prompts are read
    queue_timeout_s: float = 0.0  # a request not begun within it ends; 0: it waits as long as it takes

    def __post_init__(self) -> None:
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}, fewer than the {self.max_sequences} sequences that may "
                "decode in one step; raise it or lower max_sequences"
            )
