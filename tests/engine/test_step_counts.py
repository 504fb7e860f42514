from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tgi_server.engine.engine import StepCounts
from tgi_server.engine.request import STEP_BOUNDS_S, STEP_SIZE_BOUNDS


def plan(sequences: int, *, has_prompts: bool) -> Any:
    return SimpleNamespace(work=[None] * sequences, has_prompts=has_prompts)


def test_every_step_falls_into_one_bucket_of_its_kind_and_one_of_sizes() -> None:
    counts = StepCounts()
    counts.done(plan(3, has_prompts=True), 0.02)
    counts.done(plan(4, has_prompts=False), STEP_BOUNDS_S[0])
    counts.done(plan(5, has_prompts=False), 1e9)
    assert sum(counts.prefill_step_buckets) == counts.prefill_steps == 1
    assert sum(counts.decode_step_buckets) == counts.decode_steps == 2
    (at,) = [i for i, count in enumerate(counts.prefill_step_buckets) if count]
    assert STEP_BOUNDS_S[at - 1] < 0.02 <= STEP_BOUNDS_S[at]
    assert counts.decode_step_buckets[0] == counts.decode_step_buckets[-1] == 1
    assert counts.step_size_buckets[STEP_SIZE_BOUNDS.index(4)] == 2, "3 and 4"
    assert counts.step_size_buckets[STEP_SIZE_BOUNDS.index(8)] == 1
    assert counts.stepped_sequences == 12
