"""The scheduler against a model that notices any mistake with pages (fake_runner.py)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fake_runner import FakeLaunched, FakeRunner, expected, next_token
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Plan
from tgi_server.engine.request import FinishReason, GenerationRequest
from tgi_server.engine.scheduler import Scheduler
from tgi_server.engine.verify import Guess


@dataclass
class Rig:
    """Scheduler and runner with a simulated clock, `depth` steps planned ahead of the commits."""

    pages: int = 64
    batch_tokens: int = 64
    sequences: int = 8
    depth: int = 0
    guess: Guess | None = None
    now: float = 0.0
    answers: dict[str, list[int]] = field(default_factory=dict)
    finishes: dict[str, FinishReason] = field(default_factory=dict)
    largest_plan: int = 0

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages)
        limits = Limits(self.batch_tokens, self.sequences, max_queue=1000)
        self.scheduler = Scheduler(self.pool, limits, lambda: self.now, self.guess)
        self.runner = FakeRunner()
        self.under_way: deque[tuple[Plan, FakeLaunched]] = deque()

    def step(self) -> Plan:
        self.now += 1.0
        plan = self.scheduler.plan()
        self.largest_plan = max(self.largest_plan, plan.tokens)
        if plan.work:
            self.under_way.append((plan, self.runner.launch(plan)))
        if self.under_way and (len(self.under_way) > self.depth or not plan.work):
            done, launched = self.under_way.popleft()
            for event in self.scheduler.commit(done, launched.result()):
                self.answers.setdefault(event.id, []).extend(event.token_ids)
                if event.finish is not None:
                    self.finishes[event.id] = event.finish
        return plan

    def drain(self) -> None:
        for _ in range(100_000):
            if not (self.scheduler.running or self.scheduler.waiting or self.under_way):
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def request(
    name: str,
    prompt: list[int],
    new: int = 5,
    stop: list[int] | None = None,
    priority: int = 0,
    adapter: int = 0,
    salt: str = "",
) -> GenerationRequest:
    return GenerationRequest(
        id=name,
        prompt_ids=prompt,
        max_new_tokens=new,
        stop_token_ids=stop or [],
        priority=priority,
        adapter=adapter,
        salt=salt,
    )


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 17, 33, 200])
def test_a_request_gets_the_tokens_its_own_prompt_determines(prompt_tokens: int, depth: int) -> None:
    rig = Rig(depth=depth)
    asked = request("a", list(range(prompt_tokens)), new=40)
    assert rig.scheduler.add(asked) is None
    rig.drain()
    assert rig.answers["a"] == expected(asked)
    assert rig.finishes["a"] is FinishReason.LENGTH
    assert rig.pool.available == rig.pool.total


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stop_token_ends_the_answer_and_is_reported(depth: int) -> None:
    asked = request("a", [1, 2, 3], new=30)
    stop = expected(asked)[7]
    asked = request("a", [1, 2, 3], new=30, stop=[stop])
    rig = Rig(depth=depth)
    rig.scheduler.add(asked)
    rig.drain()
    assert rig.answers["a"] == expected(asked)
    assert rig.answers["a"][-1] == stop
    assert rig.finishes["a"] is FinishReason.EOS


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_requests_still_get_their_own_tokens(depth: int) -> None:
    rig = Rig(pages=12, depth=depth)  # room for about three of eight
    asked = [request(str(i), [i] * 30, new=40) for i in range(8)]
    for one in asked:
        rig.scheduler.add(one)
    rig.drain()
    assert rig.answers == {one.id: expected(one) for one in asked}
    assert rig.scheduler.counts.preemptions > 0
    assert rig.pool.available == rig.pool.total


def test_the_oldest_request_is_never_preempted() -> None:
    rig = Rig(pages=8, batch_tokens=32)
    for i in range(6):
        rig.scheduler.add(request(str(i), [i] * 20, new=60))
    progress = 0
    while "0" not in rig.finishes:
        plan = rig.step()
        oldest = next(work for work in plan.work if work.id == "0")
        assert oldest.start >= progress, "work of the oldest request was done twice"
        progress = oldest.start


def test_a_shared_prefix_is_computed_once_also_when_it_was_generated() -> None:
    rig = Rig()
    first = request("first", list(range(40)), new=24)
    rig.scheduler.add(first)
    rig.drain()
    spent = rig.runner.computed_tokens
    conversation = first.prompt_ids + rig.answers["first"]
    follow_up = request("next", [*conversation, 7], new=1)
    rig.scheduler.add(follow_up)
    rig.drain()
    assert rig.answers["next"] == expected(follow_up)
    # 64 tokens of conversation, of which the last was never computed: three full pages are found again.
    assert rig.runner.computed_tokens - spent == len(follow_up.prompt_ids) - 3 * PAGE_TOKENS
    assert rig.scheduler.counts.prefix_hit_tokens == 3 * PAGE_TOKENS
    assert rig.scheduler.counts.prompt_tokens == len(first.prompt_ids) + len(follow_up.prompt_ids)


def test_no_step_exceeds_its_token_budget() -> None:
    rig = Rig(batch_tokens=32, sequences=8)
    for i in range(12):
        rig.scheduler.add(request(str(i), [i] * 100, new=10))
    rig.drain()
    assert rig.largest_plan <= 32


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    rig = Rig(batch_tokens=32)
    rig.scheduler.add(request("talking", [1], new=50))
    rig.step()
    rig.scheduler.add(request("long", [2] * 500, new=1))
    while "long" not in rig.finishes and "talking" not in rig.finishes:
        assert "talking" in {work.id for work in rig.step().work}


@pytest.mark.parametrize("depth", [0, 1])
def test_cancelling_frees_the_pages_at_once(depth: int) -> None:
    rig = Rig(depth=depth)
    rig.scheduler.add(request("a", [1] * 100, new=50))
    rig.scheduler.add(request("b", [2] * 100, new=50))
    for _ in range(6):
        rig.step()
    rig.scheduler.cancel("a")
    rig.scheduler.cancel("unknown")
    held = rig.pool.total - rig.pool.available
    assert held <= 100 // PAGE_TOKENS + 2
    rig.drain()
    assert rig.answers["b"] == expected(request("b", [2] * 100, new=50))
    assert rig.pool.available == rig.pool.total


def test_what_can_never_fit_or_be_queued_is_refused_with_the_numbers() -> None:
    rig = Rig(pages=4)
    refusal = rig.scheduler.add(request("a", [1] * 60, new=10))
    assert refusal is not None and refusal.finish is FinishReason.REJECTED
    assert "69 tokens need 5 pages" in refusal.error and "has 4" in refusal.error
    full = Scheduler(PagePool(4), Limits(8, 8, max_queue=1), lambda: 0.0)
    assert full.add(request("a", [1])) is None
    refusal = full.add(request("b", [1]))
    assert refusal is not None and "try again later" in refusal.error


def test_a_failing_step_ends_its_own_requests_only() -> None:
    rig = Rig(sequences=1)
    rig.scheduler.add(request("bad", [1]))
    good = request("good", [2])
    rig.scheduler.add(good)
    plan = rig.scheduler.plan()
    events = rig.scheduler.fail(plan, "boom")
    assert [(event.id, event.finish, event.error) for event in events] == [
        ("bad", FinishReason.FAILED, "boom")
    ]
    rig.drain()
    assert rig.answers == {"good": expected(good)}
    assert rig.pool.available == rig.pool.total


def mostly_right(tokens: list[int]) -> list[int]:
    """Up to four guesses, of which the first few are right: none, some or all, as the tokens have it."""
    guesses: list[int] = []
    for i in range(sum(tokens) % 5):
        wrong = (sum(tokens) // 7 + i) % 3 == 0
        guesses.append(-1 if wrong else next_token(tokens + guesses))
    return guesses


@pytest.mark.parametrize("depth", [0, 1])
def test_guesses_that_prove_right_save_steps_and_never_change_an_answer(depth: int) -> None:
    asked = [request(str(i), [i] * 30, new=50) for i in range(6)]
    steps: dict[Guess | None, float] = {}
    for guess in (None, mostly_right):
        rig = Rig(depth=depth, guess=guess)
        for one in asked:
            rig.scheduler.add(one)
        rig.drain()
        assert rig.answers == {one.id: expected(one) for one in asked}
        assert rig.pool.available == rig.pool.total
        steps[guess] = rig.now
    if depth == 0:
        assert steps[mostly_right] < 0.8 * steps[None]


_operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 80), st.integers(1, 40), st.integers(0, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(
    operations=_operations,
    pages=st.integers(8, 40),
    depth=st.integers(0, 1),
    budget=st.sampled_from([4, 7, 16, 64]),
    guess=st.sampled_from([None, mostly_right]),
)
def test_any_mix_of_requests_gets_right_answers_and_loses_no_page(
    operations: list[tuple[object, ...]], pages: int, depth: int, budget: int, guess: Guess | None
) -> None:
    rig = Rig(pages=pages, depth=depth, batch_tokens=budget, sequences=4, guess=guess)
    asked: list[GenerationRequest] = []
    cancelled: set[str] = set()
    for operation in operations:
        match operation:
            case ("add", int(prompt), int(new), int(family)):
                asked.append(request(str(len(asked)), [family] * prompt, new))
                assert rig.scheduler.add(asked[-1]) is None
            case ("cancel", int(index)) if index < len(asked):
                cancelled.add(str(index))
                rig.scheduler.cancel(str(index))
            case ("step", int(count)):
                for _ in range(count):
                    rig.step()
    rig.drain()
    for one in asked:
        if one.id not in cancelled:
            assert rig.answers[one.id] == expected(one)
    assert rig.pool.available == rig.pool.total
    assert sorted(rig.pool.take(pages) or []) == list(range(pages)), "a page was lost or is in two places"
