"""The engine process's loop: requests in, steps computed, events out."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Protocol

from tgi_server.config import EngineConfig
from tgi_server.engine.failures import DeviceLost, OutOfDeviceMemory
from tgi_server.engine.limits import Limits
from tgi_server.engine.pages import PagePool
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.engine.request import (
    STEP_BOUNDS_S,
    STEP_SIZE_BOUNDS,
    Cancel,
    EngineStatus,
    FinishReason,
    FromEngine,
    StepEvents,
    ToEngine,
    TokenEvent,
)
from tgi_server.engine.scheduler import Scheduler

_STATUS_EVERY_S = 0.5

log = logging.getLogger(__name__)


class Wire(Protocol):
    """Where requests come from and events go: a Channel, or a list in a benchmark."""

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """What has arrived, waiting up to `timeout_s` for the first message."""

    def send(self, message: FromEngine) -> None:
        """Queue a message; never waits."""


class Launched(Protocol):
    """A step under way."""

    def result(self) -> list[Sampled]:
        """Wait for the step; one entry for each work item that samples or is scored, in the plan's order."""


class Runner(Protocol):
    """Computes plans in the order they are launched."""

    num_pages: int  # of KV cache, what the device has room for
    matrices: dict[str, str]  # format and kernel by group of the model's matrices

    def device_bytes(self) -> int:
        """Of a GPU's memory, what is held; 0 where there is none."""

    def launch(self, plan: Plan) -> Launched:
        """Start computing; returns at once where the device is asynchronous.

        Raises OutOfDeviceMemory if the step was not computed for lack of it; DeviceLost, as results may, if no step
        ever will be again.
        """


@dataclass
class StepCounts:
    """Steps since the start, under the names of EngineStatus; with prompt tokens they count as prefill."""

    prefill_steps: int = 0
    decode_steps: int = 0
    failed_prefill_steps: int = 0
    failed_decode_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stepped_sequences: int = 0
    prefill_step_buckets: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS_S) + 1))
    decode_step_buckets: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS_S) + 1))
    step_size_buckets: list[int] = field(default_factory=lambda: [0] * (len(STEP_SIZE_BOUNDS) + 1))

    def done(self, plan: Plan, seconds: float) -> None:
        self.stepped_sequences += len(plan.work)
        self.step_size_buckets[bisect_left(STEP_SIZE_BOUNDS, len(plan.work))] += 1
        bucket = bisect_left(STEP_BOUNDS_S, seconds)
        if plan.has_prompts:
            self.prefill_steps += 1
            self.prefill_s += seconds
            self.prefill_step_buckets[bucket] += 1
        else:
            self.decode_steps += 1
            self.decode_s += seconds
            self.decode_step_buckets[bucket] += 1

    def failed(self, plan: Plan) -> None:
        if plan.has_prompts:
            self.failed_prefill_steps += 1
        else:
            self.failed_decode_steps += 1


class Engine:
    """One scheduler and one runner behind a channel. `depth` steps may be under way while the next is planned."""

    def __init__(self, config: EngineConfig, runner: Runner, channel: Wire, depth: int = 0) -> None:
        limits = Limits(
            config.max_batch_tokens,
            config.max_sequences,
            config.max_queue,
            config.target_s,
            config.queue_timeout_s,
        )
        self._cpu_isa = config.cpu_isa if config.device == "cpu" else ""
        self._matrices = runner.matrices
        self._pool = PagePool(runner.num_pages)
        self._scheduler = Scheduler(self._pool, limits, time.monotonic, model=str(config.model))
        self._runner = runner
        self._channel = channel
        self._depth = depth
        self._under_way: deque[tuple[Plan, Launched]] = deque()
        self._steps = StepCounts()
        self._step_began = 0.0
        self._status_at = 0.0

    def run(self) -> None:
        """Serve until the front end is gone (PeerGone), or the device (DeviceLost)."""
        while True:
            self.step()

    def step(self) -> None:
        """Take what has arrived, start the next step, report the one whose turn it is."""
        busy = self._scheduler.running or self._scheduler.waiting or self._under_way
        for message in self._channel.receive(timeout_s=0.0 if busy else _STATUS_EVERY_S):
            self._take(message)
        self._send(self._scheduler.expire())
        plan = self._scheduler.plan()
        if plan.work:
            if not self._under_way:
                self._step_began = time.monotonic()
            self._launch(plan)
        if self._under_way and (len(self._under_way) > self._depth or not plan.work):
            self._commit(*self._under_way.popleft())
        self._report_status()

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Cancel):
            self._scheduler.cancel(message.id)
            return
        refusal = self._scheduler.add(message)
        if refusal is not None:
            self._channel.send(StepEvents([refusal]))

    def _launch(self, plan: Plan) -> None:
        try:
            self._under_way.append((plan, self._runner.launch(plan)))
        except DeviceLost:
            raise
        except OutOfDeviceMemory as error:
            self._retreat(plan, error)
        except Exception:
            self._fail(plan)

    def _commit(self, plan: Plan, launched: Launched) -> None:
        try:
            sampled = launched.result()
        except DeviceLost:
            raise
        except Exception:
            self._fail(plan)
            return
        began, self._step_began = self._step_began, time.monotonic()
        seconds = self._step_began - began
        self._steps.done(plan, seconds)
        events = self._scheduler.commit(plan, sampled, seconds)
        for event in events:
            if event.finish is FinishReason.FAILED:
                log.error("request %s failed: %s", event.id, event.error)
        self._send(events)

    def _fail(self, plan: Plan) -> None:
        """One bad step must not take the others with it: its requests end, the loop goes on."""
        self._steps.failed(plan)
        log.exception("a step of %d tokens failed; its %d requests end", plan.tokens, len(plan.work))
        self._send(
            self._scheduler.fail(plan, "the step that computed this request failed; see the server's log")
        )

    def _retreat(self, plan: Plan, error: OutOfDeviceMemory) -> None:
        """Compute the plan's work in smaller steps; what could not be smaller ends."""
        self._steps.failed(plan)
        events = self._scheduler.retreat(
            plan, f"a step of {plan.tokens} tokens found too little memory: {error}"
        )
        log.warning(
            "a step of %d tokens found too little memory (%s); %s",
            plan.tokens, error, f"{len(events)} requests end" if events else "smaller steps follow",
        )  # fmt: skip
        self._send(events)

    def _send(self, events: list[TokenEvent]) -> None:
        if events:
            self._channel.send(StepEvents(events))

    def _report_status(self) -> None:
        now = time.monotonic()
        if now - self._status_at < _STATUS_EVERY_S:
            return
        self._status_at = now
        self._channel.send(
            EngineStatus(
                phase="ready",
                waiting=self._scheduler.waiting,
                running=self._scheduler.running,
                free_pages=self._pool.available,
                total_pages=self._pool.total,
                cpu_isa=self._cpu_isa,
                matrices=self._matrices,
                device_bytes=self._runner.device_bytes(),
                **asdict(self._scheduler.counts),
                **asdict(self._steps),
            )
        )
