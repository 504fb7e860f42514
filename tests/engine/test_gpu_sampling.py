"""What a request may ask of its tokens has its effect on a GPU, step by step and beside requests that ask for less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.in_process import InProcess
from tests.engine.gpu_rig import VOCAB, Answer, answers, engine, events, prompts
from tgi_kernels.sampling import green_tokens
from tgi_server.engine.request import FinishReason, Sampling, TokenEvent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPT = prompts(8)[-1]


@pytest.fixture(scope="module")
def rig(llama: Path) -> InProcess:
    return engine(llama)


def ask(rig: InProcess, new_tokens: int = 30, **fields: Any) -> Answer:
    """The answer to a prompt with these fields, which is given beside two plain requests."""
    all_fields: list[dict[str, Any]] = [{}, fields, {}]
    return answers(rig, [PROMPT[:9], PROMPT, PROMPT[:3]], new_tokens, all_fields)[1]


def sampled(rig: InProcess, new_tokens: int = 30, **settings: Any) -> list[int]:
    return [token for token, _ in ask(rig, new_tokens, sampling=Sampling(**settings))]


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(rig: InProcess) -> None:
    one = sampled(rig, temperature=1.0, seed=7)
    assert sampled(rig, temperature=1.0, seed=7) == one
    assert sampled(rig, temperature=1.0, seed=8) != one
    assert sampled(rig, temperature=1.0, seed=7, choice=1) != one


def test_filters_that_leave_one_token_give_the_greedy_answer(rig: InProcess) -> None:
    greedy = sampled(rig)
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert sampled(rig, temperature=1.5, seed=3, **one) == greedy
    assert sampled(rig, temperature=5.0, seed=3) != greedy


def test_a_bias_decides_and_a_mask_holds_until_enough_is_generated(rig: InProcess) -> None:
    assert sampled(rig, logit_bias={77: 1000.0}) == [77] * 30
    ended = ask(rig, stop_token_ids=[77], min_new_tokens=5, sampling=Sampling(logit_bias={77: 1000.0}))
    ids = [token for token, _ in ended]
    assert len(ids) == 6 and ids[-1] == 77 and 77 not in ids[:-1]


def test_penalties_see_the_prompt_and_all_that_was_generated(rig: InProcess) -> None:
    flat = {i: 40.0 for i in range(20)}  # twenty tokens far above the others, which take turns
    ids = sampled(rig, 20, logit_bias=flat, frequency_penalty=30.0)
    assert sorted(ids) == list(range(20))
    ids = sampled(rig, 20, logit_bias=flat, presence_penalty=30.0)
    assert sorted(ids) == list(range(20))
    repeated = PROMPT[-1]
    assert sampled(rig, 1, repetition_penalty=1000.0, logit_bias={}) != [repeated]


def test_a_watermark_shows_in_the_text(rig: InProcess) -> None:
    def green_share(ids: list[int]) -> float:
        pairs = zip([PROMPT[-1], *ids[:-1]], ids, strict=True)
        return sum(bool(green_tokens(before, VOCAB)[token]) for before, token in pairs) / len(ids)

    marked = green_share(sampled(rig, 400, temperature=4.0, seed=1, watermark=True))
    plain = green_share(sampled(rig, 400, temperature=4.0, seed=1))
    assert marked > plain + 0.05


def last_events(rig: InProcess, **fields: Any) -> list[TokenEvent]:
    name = rig.submit(PROMPT, 12, **fields)
    rig.finish()
    return events(rig, name)


def test_likeliest_tokens_come_with_each_token_best_first(rig: InProcess) -> None:
    greedy = last_events(rig, top_logprobs=5)
    drawn = last_events(rig, top_logprobs=5, sampling=Sampling(temperature=2.0, seed=4))
    for event in greedy + drawn:
        for top in event.top:
            assert len(top) == 5
            assert [logprob for _, logprob in top] == sorted((logprob for _, logprob in top), reverse=True)
    for event in greedy:
        for token, logprob, top in zip(event.token_ids, event.logprobs, event.top, strict=True):
            assert top[0][0] == token
            assert top[0][1] == pytest.approx(logprob, abs=1e-5)
    assert sum(len(event.top) for event in greedy) == 12
    assert greedy[-1].finish is FinishReason.LENGTH


def test_logprobs_of_the_prompt_are_transformers(llama: Path, rig: InProcess) -> None:
    first = last_events(rig, prompt_logprobs=True, top_logprobs=2)[0]
    exact = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).cuda()
    with torch.inference_mode():
        expected = exact(torch.tensor([PROMPT], device="cuda")).logits[0].log_softmax(-1)
    theirs = expected[range(len(PROMPT) - 1), PROMPT[1:]]
    ours = torch.tensor(first.prompt_logprobs, device="cuda")
    assert (ours - theirs).abs().max() < 0.3
    assert (ours - theirs).abs().mean() < 0.05
    assert len(first.prompt_top) == len(PROMPT) - 1
