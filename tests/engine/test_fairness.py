"""Who is served before whom, on a simulated clock of one second a step."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fake_runner import expected
from tests.engine.test_scheduler import Rig, request
from tgi_server.engine.scheduler import SECONDS_PER_PRIORITY

# Seconds since the arrival before, priority, tokens to generate.
_arrivals = st.lists(
    st.tuples(st.integers(0, 5), st.integers(-3, 3), st.integers(1, 4)), min_size=2, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(arrivals=_arrivals, sequences=st.integers(1, 3), depth=st.integers(0, 1))
def test_a_request_is_overtaken_only_by_more_urgent_ones_and_only_for_so_long(
    arrivals: list[tuple[int, int, int]], sequences: int, depth: int
) -> None:
    rig = Rig(sequences=sequences, depth=depth)
    arrived: dict[str, float] = {}
    priorities: dict[str, int] = {}
    began: dict[str, int] = {}  # the step that first computed each
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        for work in rig.step().work:
            began.setdefault(work.id, steps)

    for i, (pause_s, priority, new) in enumerate(arrivals):
        for _ in range(pause_s):
            step()
        name = str(i)
        arrived[name], priorities[name] = rig.now, priority
        assert rig.scheduler.add(request(name, [i], new, priority=priority)) is None
    while len(began) < len(arrivals):
        step()
    for patient, other in permutations(arrived, 2):
        waited_s = arrived[other] - arrived[patient]
        if waited_s > 0 and began[other] < began[patient]:
            assert waited_s <= (priorities[patient] - priorities[other]) * SECONDS_PER_PRIORITY


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    pages=st.integers(9, 20),
    depth=st.integers(0, 1),
)
def test_under_any_pressure_the_oldest_request_moves_in_every_step(
    prompts: list[int], pages: int, depth: int
) -> None:
    rig = Rig(pages=pages, depth=depth)
    for i, length in enumerate(prompts):
        rig.scheduler.add(request(str(i), [i] * length, new=60))
    idle_steps = 0
    while len(rig.finishes) < len(prompts):
        oldest = next(str(i) for i in range(len(prompts)) if str(i) not in rig.finishes)
        work = [work for work in rig.step().work if work.id == oldest]
        assert all(one.epoch == 0 for one in work if one.id == "0"), "the oldest of all is never preempted"
        idle_steps = 0 if work else idle_steps + 1
        # A step ahead of its commits: nothing is planned for one whose last token is being sampled, and the
        # next in line, if it was preempted, first gets the token under way.
        assert idle_steps <= 2 * depth


def test_a_flood_of_urgent_requests_delays_a_patient_one_by_a_bounded_time() -> None:
    """Far more urgent work arrives than can be done; the patient request is served when its age is worth more."""
    rig = Rig(sequences=2)
    rig.scheduler.add(request("patient", [1], new=1, priority=2))
    for i in range(200):
        for j in range(3):
            rig.scheduler.add(request(f"{i}.{j}", [2], new=1, priority=0))
        rig.step()
        if "patient" in rig.finishes:
            break
    assert "patient" in rig.finishes
    # Those of its first 20 seconds go before: 60 requests at 2 a step.
    assert i <= 2 * SECONDS_PER_PRIORITY * 3 / 2 + 2


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("pages", [64, 16], ids=["no place free", "no page free"])
def test_an_urgent_request_takes_the_place_of_the_least_urgent_one_that_runs(depth: int, pages: int) -> None:
    rig = Rig(sequences=2 if pages == 64 else 8, pages=pages, depth=depth)
    asked = [request(f"patient{i}", [i] * 90, new=30, priority=i) for i in range(2)]
    for one in asked:
        rig.scheduler.add(one)
    for _ in range(5):
        rig.step()
    assert rig.scheduler.running == 2
    asked.append(request("urgent", [7] * 90, new=3, priority=-1))
    rig.scheduler.add(asked[-1])
    planned = {work.id: work.epoch for work in rig.step().work}
    assert "urgent" in planned and "patient1" not in planned, "the one of priority 1 goes"
    rig.drain()
    assert rig.answers == {one.id: expected(one) for one in asked}
    assert next(iter(rig.finishes)) == "urgent"
    assert rig.pool.available == rig.pool.total


def test_requests_of_one_priority_never_take_each_others_place() -> None:
    rig = Rig(sequences=2)
    for i in range(6):
        rig.scheduler.add(request(str(i), [i] * 20, new=10))
        rig.step()
    rig.drain()
    assert rig.scheduler.counts.preemptions == 0
    assert list(rig.finishes) == [str(i) for i in range(6)]
