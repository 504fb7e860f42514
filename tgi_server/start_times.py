"""About how long the phases of a start take, for `tgi-server plan`; a start itself logs what they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tgi_server.memory_plan import MemoryPlan

# Measured. GPU: an H200 machine, Llama 3.1 8B's shape, 16 GB of safetensors in the page cache (3.2 s of 8.0; from
# a disk, its speed counts instead). CPU: two cores, SmolLM2-135M: packing weights, then zeroing the cache.
_LIBRARIES_S: Final = {True: 5.0, False: 2.5}
_WEIGHTS_BYTES_PER_S: Final = {True: 5e9, False: 0.4e9}
_CACHE_BYTES_PER_S: Final = {True: 1e12, False: 2e9}
_GRAPHS_S: Final = 0.3  # 11 sizes: 0.2 to 0.3 s


def start_times(plan: MemoryPlan) -> Mapping[str, float]:
    """Seconds of each phase, under the names the start's log has for them."""
    kind = plan.on_gpu
    cache = plan.kv_bytes / _CACHE_BYTES_PER_S[kind]
    return {
        "libraries": _LIBRARIES_S[kind],
        "weights": plan.weights_bytes / _WEIGHTS_BYTES_PER_S[kind],
        "cache and graphs" if kind else "cache": cache + (_GRAPHS_S if kind else 0.0),
    }


def lines(plans: Sequence[MemoryPlan]) -> str:
    """Rows that go under the plans' table, a column each."""
    times = [start_times(plan) for plan in plans]
    rows = [("a start, about", [f"{sum(one.values()):.0f} s" for one in times])]
    rows += [(f"  {name}", [f"{one[name]:.1f} s" for one in times]) for name in times[0]]
    return "\n".join(f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows)
