"""Row 76 of `docs/faults.md`: nothing is left behind by clients that hang up."""

from __future__ import annotations

from benchmarks.soak import soaked, tiny_model
from benchmarks.soak_traffic import Mix

REQUESTS = 2000
# The cache holds two of the longest sequences, sixteen clients ask for many more: they are preempted.
OPTIONS = ("--max-total-tokens", "512", "--max-batch-total-tokens", "1024")


def test_two_thousand_requests_half_of_them_aborted_leave_everything_as_it_was() -> None:
    soak, complaints = soaked(tiny_model(), OPTIONS, Mix(), REQUESTS)
    assert complaints == []
    outcomes = soak.tally.outcomes
    assert soak.tally.requests >= REQUESTS
    assert outcomes["aborted"] > REQUESTS // 4 and outcomes["answered"] > REQUESTS // 4
    last = soak.samples[-1]
    assert last.preemptions > 0 and last.prefix_hit_tokens > 0
