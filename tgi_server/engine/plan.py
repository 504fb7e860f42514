"""What one step computes: host data only, so that every rank can be sent the same plan."""

from __future__ import annotations

import msgspec

from tgi_server.engine.request import Sampling


class Asked(msgspec.Struct, array_like=True):
    """What the sampler must know of a sequence; it keeps it under the sequence's row."""

    sampling: Sampling = Sampling()
    prompt_tokens: int = 0
    min_new_tokens: int = 0
    masked: list[int] = []  # cannot be drawn before
    before: list[int] = []  # the tokens that were found in the cache, if the sampler must remember the past

    @property
    def remembers(self) -> bool:
        """Whether what is drawn depends on the tokens before, other than through the model."""
        return self.sampling.penalised or self.sampling.watermark

    @property
    def anything(self) -> bool:
        """Whether something else than the likeliest token of the raw logits is asked for."""
        drawn = self.sampling.temperature > 0 or bool(self.sampling.logit_bias)
        return drawn or self.remembers or (self.min_new_tokens > 0 and bool(self.masked))


class Work(msgspec.Struct, array_like=True, gc=False):
    """One sequence's share of a step: positions start … start + count - 1.

    `token_ids` are the inputs; empty when the one input is the id that was last sampled for this row: it is on
    the device, and the host may not have seen it yet. `new_pages` extend the row's page table from entry
    `first_page` on.
    """

    id: str
    epoch: int  # how often the sequence was preempted; results of an earlier epoch do not count as computed
    row: int  # the sequence's row in tables that live as long as it runs
    start: int
    count: int
    token_ids: list[int]
    first_page: int
    new_pages: list[int]
    samples: bool  # its last position yields a new token
    adapter: int = 0  # what its tokens go through; 0: none
    asked: Asked | None = None  # with the first work of a sequence and after each preemption
    top_logprobs: int = 0  # likeliest tokens to report beside each one drawn or scored
    guessed: int = (
        0  # the last of token_ids are guesses: the step samples after each input, to the first wrong one
    )
    scored: list[int] = []  # the tokens after the first positions, where their logprobs are asked for


class Plan(msgspec.Struct, array_like=True, gc=False):
    """One step: single tokens of sequences that decode first, then chunks of prompts.

    Steps run in the order they are planned.
    """

    work: list[Work]

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)

    @property
    def has_prompts(self) -> bool:
        """Whether some inputs come from the host, not from the step before."""
        return any(work.token_ids for work in self.work)


class Sampled(msgspec.Struct, array_like=True, gc=False):
    """What a step gave one sequence: tokens (several under speculation), their logprobs, those of its prompt."""

    token_ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]] = []  # for each token the likeliest (id, logprob), if asked for
    prompt_logprobs: list[float] = []  # of the work's `scored`
    prompt_top: list[list[tuple[int, float]]] = []

    @property
    def is_number(self) -> bool:
        """Whether the logits were: a NaN or an infinity among them makes a logprob NaN, and that their sum."""
        total = sum(self.logprobs)
        if self.prompt_logprobs:
            total += sum(self.prompt_logprobs)
        return total == total  # noqa: PLR0124 - only NaN does not equal itself; quicker than asking by name
