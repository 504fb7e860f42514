"""The scheduler over a long random history: everything that can happen to it, in any order, and what is always true."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from tests.engine.fake_runner import FakeLaunched, FakeRunner, expected
from tests.engine.test_scheduler import mostly_right, request
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Plan
from tgi_server.engine.request import FinishReason, GenerationRequest, TokenEvent
from tgi_server.engine.scheduler import Scheduler

OPERATIONS = 100_000
PAGES, QUEUE = 12, 10


class History:
    """One scheduler and all that was asked of it. `depth` steps may be planned before the last one is committed."""

    def __init__(self, depth: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.depth = depth
        self.now = 0.0
        self.pool = PagePool(PAGES)
        limits = Limits(24, 6, QUEUE, queue_timeout_s=25.0)
        guess = mostly_right if depth == 0 else None
        self.scheduler = Scheduler(self.pool, limits, lambda: self.now, guess)
        self.runner = FakeRunner()
        self.under_way: deque[tuple[Plan, FakeLaunched]] = deque()
        self.live: dict[str, GenerationRequest] = {}
        self.answers: dict[str, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.asked = 0

    def ask(self) -> None:
        chance = self.chance
        self.asked += 1
        one = request(
            str(self.asked),
            [chance.randrange(9)] * chance.randrange(1, 90),
            chance.randrange(1, 80),
            priority=chance.choice((-2, 0, 0, 0, 1)),
            adapter=chance.choice((0, 0, 1)),
            salt=chance.choice(("", "", "other")),
        )
        refusal = self.scheduler.add(one)
        if refusal is None:
            self.live[one.id] = one
        else:
            assert refusal.finish is FinishReason.REJECTED
            assert len(self.live) >= QUEUE, "only a full queue refuses"
            self.ends["refused"] += 1

    def leave(self) -> None:
        if self.live:
            name = self.chance.choice(list(self.live))
            self.scheduler.cancel(name)
            del self.live[name]
            self.answers.pop(name, None)
            self.ends["cancelled"] += 1

    def step(self) -> None:
        """Plan and launch, or commit the oldest step, as the depth allows."""
        if len(self.under_way) <= self.depth:
            self.now += self.chance.random()
            self.see(self.scheduler.expire())
            plan = self.scheduler.plan()
            if plan.work and self.chance.random() < 0.01:
                self.see(self.scheduler.fail(plan, "injected"))
            elif plan.work:
                self.under_way.append((plan, self.runner.launch(plan)))
        if len(self.under_way) > self.depth or (self.under_way and self.chance.random() < 0.3):
            plan, launched = self.under_way.popleft()
            self.see(self.scheduler.commit(plan, launched.result()))

    def see(self, events: list[TokenEvent]) -> None:
        for event in events:
            asked = self.live[event.id]  # a KeyError: news of a request that has ended
            self.answers.setdefault(event.id, []).extend(event.token_ids)
            if event.finish is None:
                continue
            answer = self.answers.pop(event.id)
            if event.finish is FinishReason.LENGTH:
                assert answer == expected(asked)
            elif event.finish is FinishReason.WAITED:
                assert not answer
            del self.live[event.id]
            self.ends[event.finish.value] += 1

    def check(self) -> None:
        """No page is lost, and two sequences share one only if it holds the same tokens of the same owner."""
        running = self.scheduler._running
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)
        assert [sequence.key for sequence in running] == sorted(sequence.key for sequence in running)
        references = Counter(page for sequence in running for page in sequence.pages)
        assert self.pool.available == PAGES - len(references)
        content = {}
        for sequence in running:
            assert sequence.computed <= sequence.scheduled <= len(sequence.pages) * PAGE_TOKENS
            for i, page in enumerate(sequence.pages):
                if references[page] > 1:
                    assert (i + 1) * PAGE_TOKENS <= sequence.computed, (
                        "a page that is still written to is shared"
                    )
                    held = sequence.root, tuple(sequence.tokens[: (i + 1) * PAGE_TOKENS])
                    assert content.setdefault(page, held) == held


@pytest.mark.parametrize("depth", [0, 1])
def test_no_page_and_no_request_is_lost_in_a_hundred_thousand_operations(depth: int) -> None:
    history = History(depth, seed=depth)
    for _ in range(OPERATIONS):
        kind = history.chance.random()
        if kind < 0.06:
            history.ask()
        elif kind < 0.07:
            history.leave()
        else:
            history.step()
        history.check()
    while history.live or history.under_way:
        history.step()
        history.check()
    assert sorted(history.pool.take(PAGES) or []) == list(range(PAGES)), "a page was lost or is in two places"
    counts, ends = history.scheduler.counts, history.ends
    assert counts.preemptions > 1000 and counts.prefix_hit_tokens > 5000, "the history must exercise both"
    assert min(ends[end] for end in ("length", "cancelled", "failed", "waited", "refused")) > 10, ends
    assert sum(ends.values()) == history.asked
