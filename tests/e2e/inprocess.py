"""Scheduler and runner on the demo model without a process or a socket: every bit of an answer can be seen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Plan
from tgi_server.engine.request import GenerationRequest
from tgi_server.engine.runner import CpuRunner, Launched
from tgi_server.engine.scheduler import Limits, Scheduler


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # fp32 values: equal floats are equal bits

    def first(self, tokens: int) -> Answer:
        return Answer(self.ids[:tokens], self.logprobs[:tokens])

    def after(self, tokens: int) -> Answer:
        return Answer(self.ids[tokens:], self.logprobs[tokens:])


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
    ) -> None:
        self.pool = PagePool(pages or runner.num_pages)
        limits = Limits(batch_tokens, sequences, max_queue=1000, target_s=1e9)
        self._scheduler = Scheduler(self.pool, limits, time.monotonic)
        self._runner = runner
        self._depth = depth
        self.steps: list[list[int]] = []  # tokens of each work item of each step
        self.preemptions = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """Answers to all prompts, which are asked at once and end at no token."""
        for i, prompt in enumerate(prompts):
            asked = GenerationRequest(id=str(i), prompt_ids=list(prompt), max_new_tokens=new_tokens)
            assert self._scheduler.add(asked) is None
        answers = [Answer() for _ in prompts]
        under_way: deque[tuple[Plan, Launched]] = deque()
        while self._scheduler.running or self._scheduler.waiting or under_way:
            plan = self._scheduler.plan()
            if plan.work:
                self.steps.append([work.count for work in plan.work])
                self.preemptions = max(self.preemptions, *(work.epoch for work in plan.work))
                under_way.append((plan, self._runner.launch(plan)))
            if under_way and (len(under_way) > self._depth or not plan.work):
                done, launched = under_way.popleft()
                for event in self._scheduler.commit(done, launched.result()):
                    answers[int(event.id)].ids += event.token_ids
                    answers[int(event.id)].logprobs += event.logprobs
        return answers
