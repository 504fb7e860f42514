"""Whose cached prefixes a request may find: only those of its own model, adapter and salt."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fake_runner import expected
from tests.engine.test_scheduler import Rig, request
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.batch import BatchBuilder
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool, root_key
from tgi_server.engine.scheduler import Scheduler

PROMPT = list(range(5 * PAGE_TOKENS + 3))
OWNERS = list(product((0, 1, 2), ("", "alice", "bob")))


@pytest.mark.parametrize(("first", "second"), list(product(OWNERS, OWNERS)))
def test_a_prompt_is_found_by_those_of_the_same_adapter_and_salt_and_nobody_else(
    first: tuple[int, str], second: tuple[int, str]
) -> None:
    rig = Rig()
    for name, (adapter, salt) in (("first", first), ("second", second)):
        asked = request(name, PROMPT, new=20, adapter=adapter, salt=salt)
        rig.scheduler.add(asked)
        rig.drain()
        assert rig.answers[name] == expected(asked)
    found = 5 * PAGE_TOKENS if first == second else 0
    assert rig.scheduler.counts.prefix_hit_tokens == found


def test_generated_tokens_are_not_found_by_another_adapter_either() -> None:
    rig = Rig()
    rig.scheduler.add(request("first", PROMPT, new=40, adapter=1))
    rig.drain()
    grown = PROMPT + rig.answers["first"]
    for name, adapter, found in (("other", 2, 0), ("same", 1, (len(grown) - 1) // PAGE_TOKENS)):
        before = rig.scheduler.counts.prefix_hit_tokens
        rig.scheduler.add(request(name, grown, new=1, adapter=adapter))
        rig.drain()
        assert rig.scheduler.counts.prefix_hit_tokens - before == found * PAGE_TOKENS


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("batch_tokens", [16, 64, 4096])
def test_of_a_herd_with_one_prompt_one_computes_it(batch_tokens: int, depth: int) -> None:
    rig = Rig(batch_tokens=batch_tokens, sequences=16, pages=200, depth=depth)
    asked = [request(str(i), PROMPT) for i in range(12)]
    for one in asked:
        rig.scheduler.add(one)
    rig.drain()
    assert rig.answers == {one.id: expected(one) for one in asked}
    assert rig.scheduler.counts.prefix_hit_tokens == 11 * 5 * PAGE_TOKENS


def test_a_request_waits_for_the_pages_it_shares_and_then_computes_the_rest() -> None:
    rig = Rig(batch_tokens=4096)
    rig.scheduler.add(request("first", PROMPT))
    rig.scheduler.add(request("second", PROMPT[:PAGE_TOKENS] + [9] * 40))
    assert [one.id for one in rig.step().work] == ["first"]
    (second,) = (one for one in rig.step().work if one.id == "second")
    assert (second.start, second.count) == (PAGE_TOKENS, 40)


@pytest.mark.parametrize(("priority", "beside"), [(0, ["first"]), (-1, ["first", "second"])])
def test_a_request_waits_for_the_pages_of_older_ones_only(priority: int, beside: list[str]) -> None:
    rig = Rig(batch_tokens=2 * PAGE_TOKENS)
    rig.scheduler.add(request("first", PROMPT))
    rig.step()
    rig.scheduler.add(request("second", PROMPT, priority=priority))
    rig.step()
    assert [one.id for one in rig.step().work] == beside, (
        "the first has 19 tokens left, 13 are left for the second"
    )


def test_no_two_owners_have_one_root() -> None:
    triples = [*product(("", "m", "mm"), (0, 1, 256), ("", "m", "\0", "key:m"))]
    assert all(root_key(*one) != root_key(*other) for one, other in combinations(triples, 2))


def test_another_model_over_the_same_pages_finds_nothing() -> None:
    rig = Rig()
    for model, found in (("one", 0), ("other", 0), ("one", 5)):
        rig.scheduler = Scheduler(rig.pool, Limits(256, 4, max_queue=9), lambda: 0.0, model=model)
        rig.scheduler.add(request("a", PROMPT, new=1))
        rig.drain()
        assert rig.scheduler.counts.prefix_hit_tokens == found * PAGE_TOKENS


@settings(max_examples=100, deadline=None)
@given(
    owners=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["", "a", "b"])), min_size=2, max_size=8),
    pages=st.integers(10, 30),
    depth=st.integers(0, 1),
)
def test_answers_are_right_when_owners_share_a_prompt_and_a_small_cache(
    owners: list[tuple[int, str]], pages: int, depth: int
) -> None:
    """The runner refuses to read what was written for another adapter."""
    rig = Rig(pages=pages, depth=depth)
    asked = [
        request(str(i), PROMPT, new=20, adapter=adapter, salt=salt)
        for i, (adapter, salt) in enumerate(owners)
    ]
    for one in asked:
        rig.scheduler.add(one)
    rig.drain()
    assert rig.answers == {one.id: expected(one) for one in asked}
    assert rig.pool.available == rig.pool.total


def test_a_batch_has_the_adapter_of_every_token() -> None:
    scheduler = Scheduler(PagePool(64), Limits(256, 4, max_queue=9), lambda: 0.0)
    builder = BatchBuilder(4, 16)
    for i, adapter in enumerate((2, 0, 7)):
        scheduler.add(request(str(i), [i] * (3 + i), adapter=adapter))
    host = builder.build(scheduler.plan())
    assert host.adapters.dtype == np.int32
    assert host.adapters.tolist() == [2] * 3 + [0] * 4 + [7] * 5
    batch = host.on_cpu()
    assert batch.adapters is not None and batch.adapters.tolist() == host.adapters.tolist()
