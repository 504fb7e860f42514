"""The sampler's tables, fed by plans: whose settings they hold, and what they remember."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tests.engine.fake_runner import FakeRunner
from tgi_kernels.reference import sampling as oracle
from tgi_kernels.sampling import greedy
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Asked, Plan, Work
from tgi_server.engine.request import GenerationRequest, Sampling
from tgi_server.engine.sampler import MAX_EDITS, Sampler, results
from tgi_server.engine.scheduler import Scheduler

VOCAB = 50
# With equal logits the lowest id that has not occurred is the likeliest: the answer counts upwards.
COUNTING = Sampling(
    frequency_penalty=1.0, repetition_penalty=2.0, logit_bias=dict.fromkeys(range(VOCAB), 1.0)
)


def sampler(rows: int = 4, tokens: int = 64) -> Sampler:
    return Sampler(rows, tokens, VOCAB, torch.device("cpu"))


def work(row: int, start: int, token_ids: list[int], *, count: int = 0, **more: Any) -> Work:
    """Work that samples; `token_ids` empty stands for the id drawn last."""
    given: dict[str, Any] = {"samples": True, **more}
    return Work(str(row), 0, row, start, count or len(token_ids) or 1, token_ids, 0, [], **given)


def step(sampler: Sampler, *works: Work, logits: Tensor | None = None) -> list[int]:
    plan = Plan(list(works))
    sampler.read(plan)
    draws = sum(one.samples for one in works)
    return sampler.draw(plan, torch.ones(draws, VOCAB) if logits is None else logits).ids.tolist()


def test_a_step_in_which_nobody_asks_for_more_is_greedy() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    plan = Plan([work(0, 0, [1, 2], asked=Asked()), work(1, 0, [3], asked=Asked())])
    under_test = sampler()
    under_test.read(plan)
    assert not under_test.asks(plan)
    drawn = under_test.draw(plan, logits)
    ids, logprobs = greedy(logits)
    assert torch.equal(drawn.ids, ids) and torch.equal(drawn.logprobs, logprobs)


def test_penalties_see_ids_the_host_has_not_seen() -> None:
    under_test = sampler()
    asked = Asked(COUNTING, prompt_tokens=3)
    assert step(under_test, work(0, 0, [7, 0, 2], asked=asked)) == [1]
    ids = [step(under_test, work(0, 3 + i, []))[0] for i in range(6)]
    assert ids == [3, 4, 5, 6, 8, 9]


def test_penalties_see_prompts_that_came_in_chunks_or_from_the_cache() -> None:
    under_test = sampler()
    asked = Asked(COUNTING, prompt_tokens=6, before=[0, 1])
    assert step(under_test, work(2, 2, [2, 9], samples=False, asked=asked)) == []
    assert step(under_test, work(2, 4, [3, 5])) == [4]
    assert step(under_test, work(2, 6, [])) == [6]


def test_a_recomputed_sequence_goes_on_where_it_was() -> None:
    under_test = sampler()
    step(under_test, work(0, 0, [0], asked=Asked(COUNTING, prompt_tokens=1)))
    answer = [1, *(step(under_test, work(0, 1 + i, []))[0] for i in range(3))]
    assert answer == [1, 2, 3, 4]
    again = Asked(COUNTING, prompt_tokens=1, before=[0, 1, 2])
    assert step(under_test, work(3, 3, [3, 4], asked=again)) == [5]
    assert step(under_test, work(3, 5, [])) == [6]


def test_a_row_forgets_what_its_last_sequence_asked_for() -> None:
    under_test = sampler()
    masked = Asked(COUNTING, 1, min_new_tokens=9, masked=[1, 2])
    assert step(under_test, work(0, 0, [0], asked=masked)) == [3]
    drawing = work(1, 0, [0], asked=Asked(Sampling(temperature=1.0, seed=5), 1))
    both = step(under_test, work(0, 0, [0], asked=Asked()), drawing)
    assert both[0] == 0
    alone = sampler()
    assert step(alone, msgspec.structs.replace(drawing, row=0)) == both[1:]


def test_tokens_that_end_the_answer_are_masked_until_enough_are_generated() -> None:
    under_test = sampler()
    # The bias on a masked token returns when the mask goes.
    sampling = Sampling(logit_bias={4: 50.0, 6: 20.0})
    asked = Asked(sampling, 2, min_new_tokens=2, masked=[4, 0])
    ids = [step(under_test, work(0, 0, [1, 1], asked=asked))[0]]
    ids += [step(under_test, work(0, 2 + i, []))[0] for i in range(2)]
    assert ids == [6, 6, 4]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_all_64_bits_of_the_seed_and_the_choice_count(seed: int) -> None:
    drawn = []
    for sampling in (
        Sampling(temperature=1.0, seed=seed),
        Sampling(temperature=1.0, seed=seed, choice=1),
        Sampling(temperature=1.0, seed=seed ^ 1 << 40),
    ):
        under_test = sampler()
        ids = step(under_test, work(0, 0, [1], asked=Asked(sampling, 1)))
        drawn.append((*ids, *(step(under_test, work(0, 1 + i, []))[0] for i in range(20))))
    assert len(set(drawn)) == 3
    words = oracle.philox(torch.tensor([[i, 1, 0, 0] for i in range(13)]), torch.tensor(_signed(seed)))
    assert drawn[0][0] == words.flatten()[:VOCAB].argmin()  # equal logits: the smallest word wins


def _signed(seed: int) -> int:
    return seed - (seed >> 63 << 64)


def test_results_come_in_the_plans_order_with_what_each_asked_for() -> None:
    under_test = sampler()
    plan = Plan(
        [
            work(0, 5, [], asked=Asked(), top_logprobs=2),
            work(1, 0, [1, 2], samples=False, asked=Asked(), scored=[2, 3]),
            work(2, 0, [4], samples=False, asked=Asked()),
            work(3, 0, [5, 6], asked=Asked(), top_logprobs=1, scored=[6]),
        ]
    )
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([9, 1, 2, 4, 5, 6])
    under_test.read(plan)
    scores = under_test.score(plan, tokens, lambda rows: table[rows])
    assert under_test.asks(plan)
    found = results(plan, under_test.draw(plan, table[tokens[[0, 5]]]), scores)
    logprobs = table.log_softmax(-1)
    assert [len(one.token_ids) for one in found] == [1, 0, 1]
    assert found[0].token_ids == [table[9].argmax()]
    assert [token for token, _ in found[0].top[0]] == table[9].topk(2).indices.tolist()
    assert found[1].prompt_logprobs == pytest.approx([logprobs[1, 2].item(), logprobs[2, 3].item()], abs=1e-5)
    assert found[1].prompt_top == []
    assert found[2].prompt_logprobs == pytest.approx([logprobs[5, 6].item()], abs=1e-5)
    assert [[token for token, _ in top] for top in found[2].prompt_top] == [[table[5].argmax()]]
    assert found[2].top[0] == [(table[6].argmax(), found[2].logprobs[0])]


@pytest.mark.parametrize(("rows", "most"), [(1, 8), (4, 8), (20, 20), (256, 64)])
def test_a_long_prompts_logits_take_no_more_memory_than_a_steps(rows: int, most: int) -> None:
    under_test = sampler(rows, tokens=1000)
    ids = [i % VOCAB for i in range(1000)]
    plan = Plan([work(0, 0, ids, asked=Asked(), scored=ids[1:])])
    under_test.read(plan)
    seen = []

    def head(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return torch.zeros(len(rows), VOCAB)

    (found,) = under_test.score(plan, torch.zeros(1000, 1), head).values()
    assert len(found.logprobs) == sum(seen) == 999
    assert max(seen) == most


def test_more_edits_than_there_is_room_for_are_refused_with_both_numbers() -> None:
    bias = dict.fromkeys(range(MAX_EDITS + 1), 1.0)
    with pytest.raises(
        ValueError, match=f"{MAX_EDITS + 1} logit biases and stop tokens; at most {MAX_EDITS}"
    ):
        step(sampler(), work(0, 0, [1], asked=Asked(Sampling(logit_bias=bias))))


def test_a_plan_says_what_is_asked_once_for_each_time_a_sequence_starts() -> None:
    """And with the tokens that the cache spares, if the sampler must know them."""
    pool = PagePool(7)
    scheduler = Scheduler(pool, Limits(64, 4, max_queue=9), lambda: 0.0)
    runner = FakeRunner()
    prompt = list(range(40))
    wishes = {"plain": Sampling(), "penalised": COUNTING}
    for name, sampling in wishes.items():
        request = GenerationRequest(id=name, prompt_ids=prompt, max_new_tokens=40, sampling=sampling)
        assert scheduler.add(request) is None
    seen: dict[str, list[Work]] = {name: [] for name in wishes}
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        for one in plan.work:
            seen[one.id].append(one)
        scheduler.commit(plan, runner.launch(plan).result())
    assert max(one.epoch for one in seen["penalised"]) > 0
    for name, works in seen.items():
        epochs = [one.epoch for one in works]
        assert [one.asked is not None for one in works] == [
            i == 0 or epochs[i - 1] != epoch for i, epoch in enumerate(epochs)
        ]
        for one in works:
            if one.asked is not None:
                assert one.asked.sampling == wishes[name] and one.asked.prompt_tokens == 40
                assert len(one.asked.before) == (one.start if name == "penalised" else 0)
                assert one.asked.before[: len(prompt)] == prompt[: len(one.asked.before)]
    assert any(one.asked and len(one.asked.before) >= PAGE_TOKENS for one in seen["penalised"])


def test_a_prompt_whose_logprobs_are_asked_for_is_computed_and_not_found() -> None:
    scheduler = Scheduler(PagePool(16), Limits(64, 4, max_queue=9), lambda: 0.0)
    runner = FakeRunner()
    prompt = list(range(40))
    for name, asks in (("first", False), ("second", True)):
        request = GenerationRequest(id=name, prompt_ids=prompt, max_new_tokens=1, prompt_logprobs=asks)
        assert scheduler.add(request) is None
        plan = scheduler.plan()
        assert plan.work[0].start == 0
        assert plan.work[0].scored == (prompt[1:] if asks else [])
        scheduler.commit(plan, runner.launch(plan).result())
