from __future__ import annotations

import pytest

from tests.engine.test_scheduler import Rig, request
from tgi_server.engine.budget import TokenBudget


def learned(fixed_s: float, token_s: float, target_s: float = 0.1, most: int = 4096) -> TokenBudget:
    budget = TokenBudget(target_s, most)
    for tokens in (1, 40, 7, 200, 16, 90, 3):
        budget.observe(tokens, fixed_s + token_s * tokens)
    return budget


def test_a_chunk_fills_the_time_that_decoding_leaves() -> None:
    budget = learned(fixed_s=0.01, token_s=0.001)
    assert budget.prompt_tokens(decoding=10) == pytest.approx(
        80, abs=1
    )  # 0.1 s less 0.01 s less 10 × 0.001 s


def test_when_decoding_alone_takes_longer_than_the_target_a_prompt_adds_half() -> None:
    budget = learned(fixed_s=0.0, token_s=0.003)
    assert budget.prompt_tokens(decoding=200) == pytest.approx(100, abs=1)


def test_a_prompt_always_moves_on_and_never_exceeds_the_batch() -> None:
    assert learned(fixed_s=5.0, token_s=1.0).prompt_tokens(decoding=1) == 16
    assert learned(fixed_s=0.0, token_s=1e-9, most=64).prompt_tokens(decoding=4) == 60


def test_without_streams_or_experience_a_prompt_gets_the_whole_batch() -> None:
    assert learned(0.1, 0.1, most=300).prompt_tokens(decoding=0) == 300
    assert TokenBudget(0.1, 300).prompt_tokens(decoding=10) == 290


def test_steps_that_are_all_alike_still_give_a_budget() -> None:
    budget = TokenBudget(0.1, 4096)
    for _ in range(100):
        budget.observe(8, 0.016)
    assert budget.prompt_tokens(decoding=8) == pytest.approx(42, abs=1)


@pytest.mark.parametrize("odd", [0.97, 1.03, 1.1])
def test_noise_in_steps_that_are_nearly_alike_does_not_pass_for_a_slope(odd: float) -> None:
    budget = TokenBudget(0.1, 4096)
    for i in range(100):  # every other step has one token more, and happens to be faster or slower
        budget.observe(50 + i % 2, 0.05 * (odd if i % 2 else 1.0))
    assert 25 <= budget.prompt_tokens(decoding=50) <= 100, "50 ms are spare, and a token takes about 1 ms"


def test_chunks_shrink_as_the_tokens_of_a_long_prompt_become_dearer() -> None:
    """With attention over 4000 tokens one may cost five times as much as the first; streams may slow down, not stop."""
    budget = TokenBudget(0.1, 4096)
    for _ in range(50):
        budget.observe(40, 0.05)
    chunks = []
    for step in range(60):
        chunks.append(budget.prompt_tokens(decoding=40))
        budget.observe(40 + chunks[-1], 0.05 + chunks[-1] * 0.0005 * (1 + step / 15))
    assert chunks[-1] < chunks[10]
    assert 0.05 + chunks[-1] * 0.0025 < 0.17


def test_urgent_requests_overtake_but_nobody_starves() -> None:
    """One request is served at a time; a stream of urgent ones may not hold back the patient one for ever."""
    rig = Rig(sequences=1)
    rig.scheduler.add(request("running", [1], new=3))
    rig.step()
    rig.scheduler.add(request("patient", [2], new=1, priority=1))
    order: list[str] = []
    for i in range(40):
        rig.scheduler.add(request(f"urgent{i}", [3], new=1))
        rig.step()
        order += [name for name in rig.finishes if name not in order]
    assert order.index("urgent0") < order.index("patient") < len(order) - 1
    overtaken = order.index("patient")
    assert 8 <= overtaken <= 12, "priority 1 waits ten simulated seconds, one arrival each, and no longer"
