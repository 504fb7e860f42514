"""A small cache and few places. Numbers are rows of `docs/faults.md`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.conftest import Baseline, Target, attack, survived, until

PLACES = 4
CACHE_TOKENS = 1024


@pytest.fixture(scope="module")
def cramped() -> Iterator[tuple[Target, Baseline]]:
    with attack(
        *("--max-sequences", str(PLACES)),
        *("--max-total-tokens", "512"),
        *("--max-batch-total-tokens", str(CACHE_TOKENS)),
    ) as both:
        yield both


@pytest.fixture
def small(cramped: tuple[Target, Baseline]) -> Iterator[Target]:
    """Four sequences at once, and room for about two of the length the tests ask for."""
    with survived(*cramped) as target:
        yield target


def ask(target: Target, prompt: str, tokens: int, **fields: object) -> tuple[object, float]:
    """The answer's text, and when it was there."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}
    (choice,) = target.send("/v1/completions", body).json["choices"]
    return choice["text"], time.monotonic()


def _engine(target: Target) -> dict[str, int]:
    status = target.send("/info", method="GET").json["engine"]
    assert isinstance(status, dict)
    return status


def test_row_74_a_cache_that_runs_out_changes_no_answer(small: Target) -> None:
    prompts = [f"Chapter {i}. It began" for i in range(PLACES)]
    alone = [ask(small, prompt, 280)[0] for prompt in prompts]
    with ThreadPoolExecutor(PLACES) as pool:
        crowded = [text for text, _ in pool.map(lambda prompt: ask(small, prompt, 280), prompts)]
    assert crowded == alone
    assert _engine(small)["total_pages"] == CACHE_TOKENS // 16
    until(lambda: _engine(small)["free_pages"] == CACHE_TOKENS // 16, "every page is free again")
    assert _engine(small)["preemptions"] > 0


def test_row_77_urgent_requests_overtake_a_flood_which_is_served_too(small: Target) -> None:
    tokens = min(400, max(30, small.server.tokens_in(0.3)))
    with ThreadPoolExecutor(20) as pool:
        flood = [pool.submit(ask, small, f"Patient {i}", tokens, priority=50) for i in range(16)]
        time.sleep(0.3)  # the flood holds all places and queues
        urgent = [pool.submit(ask, small, f"Urgent {i}", 5, priority=-50) for i in range(2)]
        last_urgent = max(done.result()[1] for done in urgent)
        ends = sorted(done.result()[1] for done in flood)
    assert last_urgent < ends[len(ends) // 2], "urgent requests waited for half of the flood"
