"""Scheduler and runner on the demo model without a process or a socket: every bit of an answer can be seen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Plan
from tgi_server.engine.request import GenerationRequest, Sampling
from tgi_server.engine.runner import CpuRunner, Launched
from tgi_server.engine.scheduler import Scheduler
from tgi_server.engine.verify import Guess

LIKELIEST: Final = Sampling()


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # fp32 values: equal floats are equal bits

    def first(self, tokens: int) -> Answer:
        return Answer(self.ids[:tokens], self.logprobs[:tokens])

    def after(self, tokens: int) -> Answer:
        return Answer(self.ids[tokens:], self.logprobs[tokens:])


class FixedChunks:
    """A token budget that cuts prompts into pieces of one size, whatever else a step computes."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def observe(self, tokens: int, seconds: float) -> None:
        pass

    def prompt_tokens(self, decoding: int) -> int:
        del decoding
        return self._tokens

    def shrink(self, prompt_tokens: int) -> bool:
        raise AssertionError(f"{prompt_tokens} tokens do not fit a CPU's memory")


class Rig:
    """One scheduler with an empty prefix cache; steps are computed `depth` ahead of their commits."""

    def __init__(
        self,
        runner: CpuRunner,
        *,
        pages: int | None = None,
        batch_tokens: int = 4096,
        sequences: int = 1,
        depth: int = 0,
        chunk: int | None = None,
        guess: Guess | None = None,
    ) -> None:
        """chunk: prompts are read one after the other, in pieces of so many tokens, beside those that decode."""
        self.pool = PagePool(pages or runner.num_pages)
        limits = Limits(batch_tokens, sequences, max_queue=1000, target_s=1e9)
        budget = FixedChunks(chunk) if chunk else None
        self._scheduler = Scheduler(self.pool, limits, time.monotonic, guess, budget=budget)
        self._runner = runner
        self._depth = depth
        self._chunked = chunk is not None
        self._asked = 0
        self.steps: list[list[int]] = []  # tokens of each work item of each step
        self.chunks: dict[int, list[int]] = {}  # by prompt: the sizes of the pieces it was read in
        self.epochs: dict[str, int] = {}  # by request id: how often it was preempted

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        sampling: Sampling = LIKELIEST,
        interrupt_at: int | None = None,
    ) -> list[Answer]:
        """Answers to all prompts, which are asked at once and end at no token.

        interrupt_at: the step before which urgent requests take the places of all that run.
        """
        answers = [Answer() for _ in prompts]
        unasked = deque(enumerate(prompts))
        under_way: deque[tuple[Plan, Launched]] = deque()
        self.steps.clear()
        self.chunks.clear()
        while unasked or self._scheduler.running or self._scheduler.waiting or under_way:
            self._ask(unasked, new_tokens, sampling)
            if len(self.steps) == interrupt_at:
                self._interrupt()
            plan = self._scheduler.plan()
            if plan.work:
                self._note(plan, prompts)
                under_way.append((plan, self._runner.launch(plan)))
            if under_way and (len(under_way) > self._depth or not plan.work):
                done, launched = under_way.popleft()
                for event in self._scheduler.commit(done, launched.result()):
                    if event.id.isdecimal():
                        answers[int(event.id)].ids += event.token_ids
                        answers[int(event.id)].logprobs += event.logprobs
        return answers

    def _ask(self, unasked: deque[tuple[int, Sequence[int]]], new_tokens: int, sampling: Sampling) -> None:
        """All at once; if pieces shall have one size, a prompt comes when the one before is read."""
        while unasked and not (self._chunked and self._reading()):
            name, prompt = unasked.popleft()
            asked = GenerationRequest(
                id=str(name), prompt_ids=list(prompt), max_new_tokens=new_tokens, sampling=sampling
            )
            assert self._scheduler.add(asked) is None

    def _reading(self) -> bool:
        return self._scheduler.waiting > 0 or any(
            sequence.scheduled < len(sequence.request.prompt_ids) for sequence in self._scheduler._running
        )

    def _interrupt(self) -> None:
        """Each displaces one, a step at a time, and stays until all have."""
        for i in range(self._scheduler.running):
            urgent = GenerationRequest(id=f"urgent {i}", prompt_ids=[5, i], max_new_tokens=30, priority=-100)
            assert self._scheduler.add(urgent) is None

    def _note(self, plan: Plan, prompts: Sequence[Sequence[int]]) -> None:
        self.steps.append([work.count for work in plan.work])
        for work in plan.work:
            self.epochs[work.id] = work.epoch
            if work.id.isdecimal() and work.start < len(prompts[int(work.id)]):
                self.chunks.setdefault(int(work.id), []).append(work.count)
