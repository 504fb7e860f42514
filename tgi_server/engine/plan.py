"""What one step computes: host data only, so that every rank can be sent the same plan."""

from __future__ import annotations

import msgspec


class Work(msgspec.Struct, array_like=True):
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


class Plan(msgspec.Struct, array_like=True):
    """One step: single tokens of sequences that decode first, then chunks of prompts.

    Steps run in the order they are planned.
    """

    work: list[Work]

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


class Sampled(msgspec.Struct, array_like=True):
    """What a step gave one sampling sequence: tokens (several under speculation) and their logprobs."""

    token_ids: list[int]
    logprobs: list[float]
