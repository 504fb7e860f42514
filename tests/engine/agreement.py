"""What one device answers, and what another thinks of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.in_process import InProcess
from tests.engine.gpu_rig import answers, events


@dataclass(frozen=True)
class Said:
    """The likeliest tokens after a prompt."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    gaps: list[float]  # by how much each is likelier than the second, in nats


@dataclass(frozen=True)
class Opinion:
    """What another device thinks of what was said: all of it, read as a prompt, and by what it says itself."""

    errors: torch.Tensor  # of every token's logprob: [tokens of all]
    # Where another token is its likeliest: prompt, token, and the gap there.
    others: list[tuple[int, int, float]]
    parted: list[tuple[int, int, float]]  # where its own answer is another from there on


def say(rig: InProcess, prompts: list[list[int]], new_tokens: int) -> list[Said]:
    names = [rig.submit(prompt, new_tokens, top_logprobs=2) for prompt in prompts]
    rig.finish()
    said = []
    for name, prompt in zip(names, prompts, strict=True):
        ids, logprobs = zip(*rig.wire.tokens[name], strict=True)
        top = [two for event in events(rig, name) for two in event.top]
        gaps = [best[1] - second[1] for best, second in top]
        said.append(Said(prompt, list(ids), list(logprobs), gaps))
    return said


def opinion(rig: InProcess, said: list[Said]) -> Opinion:
    """All of `said` with as many tokens."""
    names = [rig.submit(one.prompt + one.ids, 1, prompt_logprobs=True, top_logprobs=1) for one in said]
    rig.finish()
    errors, others = [], []
    for i, (name, one) in enumerate(zip(names, said, strict=True)):
        first, start = events(rig, name)[0], len(one.prompt) - 1
        errors += [
            ours - theirs for ours, theirs in zip(first.prompt_logprobs[start:], one.logprobs, strict=True)
        ]
        likeliest = [top[0][0] for top in first.prompt_top[start:]]
        others += [(i, at, one.gaps[at]) for at in _differing(likeliest, one.ids)]
    parted = []
    own = answers(rig, [one.prompt for one in said], len(said[0].ids))
    for i, (one, answer) in enumerate(zip(said, own, strict=True)):
        parted += [(i, at, one.gaps[at]) for at in _differing([token for token, _ in answer], one.ids)[:1]]
    return Opinion(torch.tensor(errors), others, parted)


def _differing(ids: list[int], others: list[int]) -> list[int]:
    return [at for at, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other]
