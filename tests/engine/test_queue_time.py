"""A request that waits too long for its first step ends, on a simulated clock of one second a step."""

from __future__ import annotations

import random

import pytest

from tests.engine.fake_runner import expected
from tests.engine.test_scheduler import Rig, request
from tgi_server.engine.limits import Limits
from tgi_server.engine.request import FinishReason
from tgi_server.engine.scheduler import Scheduler


def limited(seconds: float, sequences: int = 1, pages: int = 64) -> Rig:
    rig = Rig(sequences=sequences, pages=pages)
    limits = Limits(64, sequences, max_queue=1000, queue_timeout_s=seconds)
    rig.scheduler = Scheduler(rig.pool, limits, lambda: rig.now)
    return rig


def test_what_was_not_begun_in_time_ends_without_a_page() -> None:
    rig = limited(10.0)
    rig.scheduler.add(request("running", [1], new=100))
    rig.step()
    held = rig.pool.available
    rig.scheduler.add(request("late", [2] * 500, new=5))
    for _ in range(10):
        assert rig.scheduler.expire() == []
        assert all(work.id == "running" for work in rig.step().work)
    rig.now += 0.5
    (event,) = rig.scheduler.expire()
    assert (event.id, event.finish, event.token_ids) == ("late", FinishReason.WAITED, [])
    assert "10.5 s" in event.error and "10 s" in event.error
    assert rig.pool.available == held and rig.scheduler.waiting == 0
    rig.drain()
    assert set(rig.answers) == {"running"}


def test_without_a_limit_a_request_waits_as_long_as_it_takes() -> None:
    rig = limited(0.0)
    rig.scheduler.add(request("a", [1]))
    rig.now += 1e6
    assert rig.scheduler.expire() == []
    rig.drain()
    assert rig.finishes == {"a": FinishReason.LENGTH}


def test_one_that_was_begun_is_never_ended_even_if_preemption_makes_it_wait_again() -> None:
    rig = limited(5.0, sequences=4, pages=12)
    asked = [request(str(i), [i] * 40, new=100) for i in range(2)]
    for one in asked:
        rig.scheduler.add(one)
    while len(rig.finishes) < 2:
        rig.step()
        assert rig.scheduler.expire() == []
    assert rig.scheduler.counts.preemptions > 0
    assert rig.answers == {one.id: expected(one) for one in asked}


def test_patient_requests_wait_no_longer_than_urgent_ones() -> None:
    """The limit counts from the arrival, whatever the priority."""
    rig = limited(10.0)
    rig.scheduler.add(request("running", [0], new=100))
    rig.step()
    for name, priority in (("patient", 50), ("urgent", 10), ("plain", 1)):
        rig.scheduler.add(request(name, [1], priority=priority))
        rig.step()
    rig.now += 7.5
    ended = []
    for _ in range(3):
        ended.append([event.id for event in rig.scheduler.expire()])
        rig.now += 1.0
    assert ended == [["patient"], ["urgent"], ["plain"]]


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_once_and_those_that_wait_have_not_waited_too_long(seed: int) -> None:
    chance = random.Random(seed)
    rig = limited(6.0, sequences=2, pages=20)
    asked = {}
    ended: list[str] = []
    cancelled: set[str] = set()
    for i in range(300):
        if chance.random() < 0.5:
            one = request(
                str(i),
                [i % 7] * chance.randrange(1, 60),
                chance.randrange(1, 12),
                priority=chance.randrange(-2, 3),
            )
            asked[one.id] = one
            assert rig.scheduler.add(one) is None
        if chance.random() < 0.1 and asked:
            gone = chance.choice(list(asked))
            if gone not in rig.finishes and gone not in ended:
                cancelled.add(gone)
            rig.scheduler.cancel(gone)
        ended += [event.id for event in rig.scheduler.expire()]
        rig.step()
    while rig.scheduler.running or rig.scheduler.waiting:
        ended += [event.id for event in rig.scheduler.expire()]
        rig.step()
    assert len(ended) == len(set(ended)) and ended, "the history must have some"
    assert not set(ended) & set(rig.answers)
    assert {*ended, *rig.finishes, *cancelled} == set(asked)
    assert all(rig.answers[name] == expected(asked[name]) for name in rig.finishes if name not in cancelled)
    assert rig.pool.available == rig.pool.total
