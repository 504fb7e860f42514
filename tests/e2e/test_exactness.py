"""A token's bits depend on its own sequence alone, and the tokens are those of transformers in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.e2e.conftest import NEW_TOKENS, Reference
from tests.e2e.inprocess import Answer, Rig
from tgi_kernels import cpu
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.runner import CpuRunner

TIE = 1e-3  # transformers' two best logits may be this near; either is then right
SOME_TOKENS = 20  # of an answer, where computing all would prove no more: past a page's end


def test_tokens_and_logprobs_equal_those_of_transformers(
    reference: Reference, oracle_logprobs: list[Tensor]
) -> None:
    ties = []
    for i, (answer, logprobs) in enumerate(zip(reference.answers, oracle_logprobs, strict=True)):
        ours = torch.tensor(answer.ids)
        theirs = logprobs.gather(1, ours[:, None])[:, 0]
        short_of_best = logprobs.max(-1).values - theirs
        assert short_of_best.max() <= TIE, f"prompt {i}: {short_of_best.max()} at {short_of_best.argmax()}"
        error = (torch.tensor(answer.logprobs) - theirs).abs().max()
        assert error <= 1e-3, f"prompt {i}: a logprob is off by {error}"
        ties += [(i, at.item()) for at in (logprobs.argmax(-1) != ours).nonzero()]
    print(f"ties that fell the other way, as (prompt, token): {ties}")
    assert len(ties) <= 5, "that many near ties are no accident"


@pytest.mark.parametrize("depth", [0, 1])
def test_an_answer_has_the_same_bits_among_sixteen(
    runner: CpuRunner, reference: Reference, depth: int
) -> None:
    rig = Rig(runner, sequences=16, depth=depth)
    assert rig.generate(reference.prompts, NEW_TOKENS) == reference.answers
    assert max(map(len, rig.steps)) == 16


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 256])
def test_an_answer_has_the_same_bits_however_its_prompt_is_cut(
    runner: CpuRunner, reference: Reference, chunk: int
) -> None:
    for prompt, answer in zip(reference.prompts, reference.answers, strict=True):
        if len(prompt) > 40 * chunk:
            continue  # so many steps prove no more
        rig = Rig(runner, batch_tokens=chunk)
        assert rig.generate([prompt], SOME_TOKENS) == [answer.first(SOME_TOKENS)]
        assert rig.steps[: -(-len(prompt) // chunk) - 1] == [[chunk]] * ((len(prompt) - 1) // chunk)


def test_an_answer_has_the_same_bits_when_prompts_are_cut_among_streams(
    runner: CpuRunner, reference: Reference
) -> None:
    rig = Rig(runner, sequences=16, batch_tokens=61)
    answers = rig.generate(reference.prompts, SOME_TOKENS)
    assert answers == [answer.first(SOME_TOKENS) for answer in reference.answers]
    assert any(len(step) > 1 and max(step) > 1 for step in rig.steps)


@pytest.mark.parametrize("asked_before", [0, 40], ids=["prompt", "generated"])
def test_an_answer_has_the_same_bits_after_a_prefix_hit(
    runner: CpuRunner, reference: Reference, asked_before: int
) -> None:
    """The second request finds the pages of the first: of its prompt, and of what was generated."""
    rig = Rig(runner, sequences=16)
    rig.generate(reference.prompts, max(asked_before, 1))
    grown = [
        prompt + answer.ids[:asked_before]
        for prompt, answer in zip(reference.prompts, reference.answers, strict=True)
    ]
    rig.steps.clear()
    answers = rig.generate(grown, SOME_TOKENS)
    expected = [answer.after(asked_before).first(SOME_TOKENS) for answer in reference.answers]
    assert answers == expected
    computed = sum(map(sum, rig.steps)) - len(grown) * (SOME_TOKENS - 1)
    # All that was computed before is found, in whole pages; the last token is always computed.
    before = [len(prompt) + max(asked_before - 1, 0) for prompt in reference.prompts]
    found = [min(done, len(prompt) - 1) // PAGE_TOKENS for done, prompt in zip(before, grown, strict=True)]
    assert computed == sum(map(len, grown)) - PAGE_TOKENS * sum(found)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_answer_has_the_same_bits_after_preemption(
    runner: CpuRunner, reference: Reference, depth: int
) -> None:
    some = range(10)
    rig = Rig(runner, pages=20, sequences=16, depth=depth)  # room for four or five at their full length
    answers = rig.generate([reference.prompts[i] for i in some], NEW_TOKENS)
    assert answers == [reference.answers[i] for i in some]
    assert rig.preemptions > 0
    assert rig.pool.available == rig.pool.total


def test_an_answer_has_the_same_bits_on_any_number_of_threads(
    runner: CpuRunner, reference: Reference
) -> None:
    threads = cpu.num_threads()
    try:
        for other in (1, 3):
            cpu.set_num_threads(other)
            answers = Rig(runner, sequences=16).generate(reference.prompts[:-1], SOME_TOKENS)
            assert answers == [answer.first(SOME_TOKENS) for answer in reference.answers[:-1]]
    finally:
        cpu.set_num_threads(threads)


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    if request.param not in cpu.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.mark.usefixtures("isa")
def test_every_instruction_set_agrees_with_transformers(
    runner: CpuRunner, reference: Reference, oracle_logprobs: list[Tensor]
) -> None:
    answers = Rig(runner, sequences=16).generate(reference.prompts[:-1], SOME_TOKENS)
    for answer, other, logprobs in zip(answers, reference.answers[:-1], oracle_logprobs[:-1], strict=True):
        alike = _common(answer, other)
        theirs = logprobs[:alike].gather(1, torch.tensor(answer.ids[:alike])[:, None])[:, 0]
        assert (torch.tensor(answer.logprobs[:alike]) - theirs).abs().max() <= 1e-3
        if alike < SOME_TOKENS:
            best = logprobs[alike].topk(2).values
            assert best[0] - best[1] <= TIE, "only a tie may fall the other way"


def _common(one: Answer, other: Answer) -> int:
    """How many tokens, of `one`'s, they begin alike."""
    pairs = zip(one.ids, other.ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.ids))
