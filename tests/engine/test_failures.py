"""Steps that fail: who pays for it, and who must not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engine.fake_runner import FakeLaunched, FakeRunner, expected
from tgi_server.config import EngineConfig
from tgi_server.engine.engine import Engine
from tgi_server.engine.failures import DeviceLost, OutOfDeviceMemory
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.engine.request import FinishReason, FromEngine, GenerationRequest, StepEvents, ToEngine

CONFIG = EngineConfig(
    model=Path(),
    max_total_tokens=600,
    max_batch_tokens=256,
    max_sequences=8,
    max_queue=50,
    num_pages=0,
    num_threads=1,
)


@dataclass
class Wire:
    requests: list[ToEngine]
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finish: dict[str, FinishReason] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        del timeout_s
        arrived, self.requests = self.requests, []
        return arrived

    def send(self, message: FromEngine) -> None:
        for event in message.events if isinstance(message, StepEvents) else ():
            self.tokens.setdefault(event.id, []).extend(event.token_ids)
            if event.finish is not None:
                self.finish[event.id] = event.finish
                self.errors[event.id] = event.error


class Failing(FakeRunner):
    """Fails as `fails` says, before anything of the step is computed."""

    def __init__(self, fails: Callable[[Plan], Exception | None]) -> None:
        super().__init__(num_pages=300)
        self._fails = fails
        self.sizes: list[int] = []

    def launch(self, plan: Plan) -> FakeLaunched:
        if (error := self._fails(plan)) is not None:
            raise error
        self.sizes.append(plan.tokens)
        return super().launch(plan)


def requests(count: int = 6) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=str(i), prompt_ids=[(7 * i + j) % 997 for j in range(20 + 60 * i)], max_new_tokens=30
        )
        for i in range(count)
    ]


def run(runner: FakeRunner, depth: int = 1) -> tuple[Wire, Engine]:
    wire = Wire(list(requests()))
    engine = Engine(CONFIG, runner, wire, depth)
    for _ in range(2000):
        engine.step()
        if len(wire.finish) == len(requests()):
            break
    return wire, engine


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_too_large_for_the_memory_is_computed_in_smaller_ones(depth: int) -> None:
    def short_of_memory(plan: Plan) -> Exception | None:
        return OutOfDeviceMemory("0.10 GiB free") if plan.tokens > 70 else None

    runner = Failing(short_of_memory)
    wire, engine = run(runner, depth)
    for request in requests():
        assert wire.tokens[request.id] == expected(request)
        assert wire.finish[request.id] is FinishReason.LENGTH
    assert max(runner.sizes) > 35  # not smaller than need be
    assert engine._pool.available == engine._pool.total


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_for_which_no_step_is_small_enough_ends_with_the_numbers(depth: int) -> None:
    def no_memory_for_prompts(plan: Plan) -> Exception | None:
        prompts = sum(work.count for work in plan.work if len(work.token_ids) > 1 and work.id == "5")
        return OutOfDeviceMemory("0.10 GiB free") if prompts else None

    wire, engine = run(Failing(no_memory_for_prompts), depth)
    assert wire.finish["5"] is FinishReason.EXHAUSTED
    assert "tokens found too little memory: 0.10 GiB free" in wire.errors["5"]
    ended = {name for name, finish in wire.finish.items() if finish is FinishReason.EXHAUSTED}
    for request in requests():
        if request.id not in ended:
            assert wire.tokens[request.id] == expected(request)
    assert len(ended) < 6
    assert engine._pool.available == engine._pool.total


def test_steps_grow_again_when_there_is_memory_again() -> None:
    steps = iter(range(10_000))

    def once(plan: Plan) -> Exception | None:
        return OutOfDeviceMemory("none") if next(steps) == 0 and plan.work else None

    runner = Failing(once)
    wire, _ = run(runner)
    assert wire.tokens == {request.id: expected(request) for request in requests()}
    assert runner.sizes[0] <= 128 < max(runner.sizes)


@pytest.mark.parametrize("depth", [0, 1])
def test_any_other_failing_step_ends_its_requests_and_no_others(depth: int) -> None:
    beside: set[str] = set()

    def bug(plan: Plan) -> Exception | None:
        if all(work.id != "3" for work in plan.work):
            return None
        beside.update(work.id for work in plan.work)
        return RuntimeError("a bug")

    wire, engine = run(Failing(bug), depth)
    failed = {name for name, finish in wire.finish.items() if finish is FinishReason.FAILED}
    assert failed == beside and len(failed) < 6
    assert all(wire.tokens[r.id] == expected(r) for r in requests() if r.id not in failed)
    assert engine._pool.available == engine._pool.total


class LostWhenAsked(FakeLaunched):
    def result(self) -> list[Sampled]:
        raise DeviceLost("a GPU is lost")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("when", ["launch", "result"])
def test_a_lost_device_ends_the_engine(depth: int, when: str) -> None:
    class Lost(FakeRunner):
        def launch(self, plan: Plan) -> FakeLaunched:
            assert plan.work
            if when == "launch":
                raise DeviceLost("a GPU is lost")
            return LostWhenAsked([])

    with pytest.raises(DeviceLost, match="a GPU is lost"):
        run(Lost(), depth)
