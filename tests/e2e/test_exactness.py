"""A token's bits depend on its own sequence alone, and the tokens are those of transformers in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.e2e.conftest import NEW_TOKENS, Reference
from tests.e2e.inprocess import LIKELIEST, Answer, Rig
from tgi_kernels import cpu
from tgi_server.config import PAGE_TOKENS
from tgi_server.engine.request import Sampling
from tgi_server.engine.runner import CpuRunner
from tgi_server.engine.sequence import pages_for
from tgi_server.engine.verify import Guess

TIE = 1e-3  # transformers' two best logits may be this near; either is then right
SOME_TOKENS = 20  # of an answer, where computing all would prove no more: past a page's end


def slow(*values: object) -> Any:  # pytest gives the type no public name
    """Runs with `-m slow` only: a way to go that differs little from one that always runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


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


@pytest.mark.parametrize(("chunk", "depth"), [(1, 1), (7, 0), slow(16, 1), (64, 0), slow(256, 1)])
def test_an_answer_has_the_same_bits_however_its_prompt_is_cut(
    runner: CpuRunner, reference: Reference, chunk: int, depth: int
) -> None:
    """Beside up to fifteen that decode already."""
    read = [i for i, prompt in enumerate(reference.prompts) if chunk > 1 or len(prompt) < 100]
    prompts = [reference.prompts[i] for i in read]
    rig = Rig(runner, sequences=16, chunk=chunk, depth=depth)
    assert rig.generate(prompts, NEW_TOKENS) == [reference.answers[i] for i in read]
    for i, prompt in enumerate(prompts):
        pieces = [chunk] * (len(prompt) // chunk) + [len(prompt) % chunk]
        assert rig.chunks[i] == [piece for piece in pieces if piece]


def test_an_answer_has_the_same_bits_when_prompts_are_cut_among_streams(
    runner: CpuRunner, reference: Reference
) -> None:
    rig = Rig(runner, sequences=16, batch_tokens=61)
    assert rig.generate(reference.prompts, NEW_TOKENS) == reference.answers
    assert any(len(step) > 1 and max(step) > 1 for step in rig.steps)


@pytest.mark.parametrize(("asked_before", "depth"), [(0, 1), (33, 0)], ids=["prompt", "generated"])
def test_an_answer_has_the_same_bits_after_a_prefix_hit(
    runner: CpuRunner, reference: Reference, asked_before: int, depth: int
) -> None:
    """The second request finds the pages of the first: of its prompt, and of what was generated."""
    rig = Rig(runner, sequences=16, depth=depth)
    begun = rig.generate(reference.prompts, max(asked_before, 1))
    assert begun == [answer.first(max(asked_before, 1)) for answer in reference.answers]
    grown = [
        prompt + answer.ids[:asked_before]
        for prompt, answer in zip(reference.prompts, reference.answers, strict=True)
    ]
    answers = rig.generate(grown, NEW_TOKENS - asked_before)
    assert answers == [answer.after(asked_before) for answer in reference.answers]
    computed = sum(map(sum, rig.steps)) - len(grown) * (NEW_TOKENS - asked_before - 1)
    # All that was computed before is found, in whole pages; the last token is always computed.
    before = [len(prompt) + max(asked_before - 1, 0) for prompt in reference.prompts]
    found = [min(done, len(prompt) - 1) // PAGE_TOKENS for done, prompt in zip(before, grown, strict=True)]
    assert computed == sum(map(len, grown)) - PAGE_TOKENS * sum(found)


@pytest.mark.parametrize("depth", [0, slow(1)])
def test_an_answer_has_the_same_bits_after_preemption_for_want_of_pages(
    runner: CpuRunner, reference: Reference, depth: int
) -> None:
    """What is evicted is computed again: of short prompts with room for few, and of the long one beside them."""
    short = range(len(reference.prompts) - 1)
    rig = Rig(runner, pages=20, sequences=16, depth=depth)  # room for four or five at their full length
    answers = rig.generate([reference.prompts[i] for i in short], NEW_TOKENS)
    assert answers == [reference.answers[i] for i in short]
    assert sum(epoch > 0 for epoch in rig.epochs.values()) >= 10
    assert rig.pool.available == rig.pool.total
    some = [0, 1, 2, 3, len(reference.prompts) - 1]
    prompts = [reference.prompts[i] for i in some]
    rig = Rig(runner, pages=sum(pages_for(len(prompt) + 16) for prompt in prompts), sequences=16, depth=depth)
    assert rig.generate(prompts, NEW_TOKENS) == [reference.answers[i] for i in some]
    assert rig.epochs["4"] > 0, "the long one goes, it came last"


@pytest.mark.parametrize(("step", "depth"), [(7, 0), slow(40, 1)])
def test_an_answer_has_the_same_bits_after_urgent_requests_took_its_place(
    runner: CpuRunner, reference: Reference, step: int, depth: int
) -> None:
    rig = Rig(runner, sequences=len(reference.prompts), depth=depth)
    assert rig.generate(reference.prompts, NEW_TOKENS, interrupt_at=step) == reference.answers
    assert all(rig.epochs[str(i)] > 0 for i in range(len(reference.prompts)))


def guesser(prompts: list[list[int]], answers: list[Answer]) -> Guess:
    """Guesses up to four tokens of these answers, now and then a wrong one among them."""
    known = [prompt + answer.ids for prompt, answer in zip(prompts, answers, strict=True)]

    def guess(tokens: list[int]) -> list[int]:
        whole = next(one for one in known if one[: len(tokens)] == tokens)
        guesses = whole[len(tokens) : len(tokens) + len(tokens) % 5]
        if guesses and len(tokens) % 3 == 0:
            guesses[-1] += 1
        return guesses

    return guess


DRAWN = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=5)


@pytest.mark.parametrize("sampling", [LIKELIEST, slow(DRAWN)], ids=["likeliest", "drawn"])
def test_an_answer_has_the_same_bits_when_its_tokens_were_guessed(
    runner: CpuRunner, reference: Reference, sampling: Sampling
) -> None:
    """A step verifies several tokens of each sequence, wrong guesses among them."""
    expected = reference.answers
    if sampling != LIKELIEST:
        expected = Rig(runner, sequences=16).generate(reference.prompts, NEW_TOKENS, sampling=sampling)
    rig = Rig(runner, sequences=16, guess=guesser(reference.prompts, expected))
    assert rig.generate(reference.prompts, NEW_TOKENS, sampling=sampling) == expected
    assert len(rig.steps) < 1.4 * NEW_TOKENS, (
        "without guesses, 24 answers take twice 64 steps at sixteen a time"
    )


def test_an_answer_has_the_same_bits_on_any_number_of_threads(
    runner: CpuRunner, reference: Reference
) -> None:
    threads = cpu.num_threads()
    try:
        for other in (1, 3):
            cpu.set_num_threads(other)
            answers = Rig(runner, sequences=16).generate(reference.prompts, NEW_TOKENS)
            assert answers == reference.answers
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
