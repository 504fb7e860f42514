"""Who is served before whom, on a simulated clock of one second a step."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

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
