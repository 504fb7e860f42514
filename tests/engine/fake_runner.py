"""A runner whose model is a hash of the tokens it reads back from its paged cache.

A page that is lost, shared wrongly or written by another sequence changes the answer, so comparing with
`expected` proves the scheduler's bookkeeping without a tensor.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.plan import Plan, Sampled, Work
from tgi_server.engine.request import GenerationRequest

VOCAB = 1000


def next_token(tokens: list[int], adapter: int = 0) -> int:
    return zlib.crc32(repr((tokens, adapter)).encode()) % VOCAB


def expected(request: GenerationRequest) -> list[int]:
    """What `request` must get, whatever else runs."""
    tokens = list(request.prompt_ids)
    while len(tokens) < len(request.prompt_ids) + request.max_new_tokens:
        tokens.append(next_token(tokens, request.adapter))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[len(request.prompt_ids) :]


@dataclass
class FakeLaunched:
    sampled: list[Sampled]

    def result(self) -> list[Sampled]:
        return self.sampled


class FakeRunner:
    def __init__(self, num_pages: int = 2000) -> None:
        self.num_pages = num_pages
        self.matrices: dict[str, str] = {}
        self.cache: dict[int, tuple[int, int]] = {}  # by slot: token, and the adapter it went through
        self.tables: dict[int, list[int]] = {}
        self.last_ids: dict[int, int] = {}
        self.computed_tokens = 0

    def device_bytes(self) -> int:
        return 0

    def launch(self, plan: Plan) -> FakeLaunched:
        sampled = []
        fed = {work.row: self.last_ids.get(work.row, -1) for work in plan.work}
        for work in plan.work:
            table = self.tables[work.row] = self.tables.get(work.row, [])[: work.first_page] + work.new_pages
            inputs = work.token_ids or [fed[work.row]]
            for position, token in enumerate(inputs, start=work.start):
                self.cache[self._slot(table, position)] = token, work.adapter
        for work in plan.work:
            self.computed_tokens += work.count
            if work.samples:
                ids = self._sample(work)
                self.last_ids[work.row] = ids[-1]
                sampled.append(Sampled(ids, [-1.0] * len(ids)))
        return FakeLaunched(sampled)

    def _sample(self, work: Work) -> list[int]:
        """One token, and one more for each guess that proves right."""
        table = self.tables[work.row]
        end = work.start + work.count
        cached = [self.cache[self._slot(table, i)] for i in range(end)]
        assert all(adapter == work.adapter for _, adapter in cached), "keys and values of another adapter"
        tokens = [token for token, _ in cached]
        ids: list[int] = []
        for length in range(end - work.guessed, end + 1):
            ids.append(next_token(tokens[:length], work.adapter))
            if length < end and tokens[length] != ids[-1]:
                break
        return ids

    @staticmethod
    def _slot(table: list[int], position: int) -> int:
        return table[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
