"""What this process may use: cores and memory, from affinity and control groups, and the limits derived from them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from tgi_server.config import PAGE_TOKENS, ModelConfig
from tgi_server.errors import StartupError

_CGROUP = Path("/sys/fs/cgroup")
_KV_SHARE_OF_MEMORY = (
    0.25  # the rest is for weights, activations and the page cache that holds the checkpoint
)


def usable_cores() -> int:
    """Cores this process may run on: its affinity, cut by a CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _read(_CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def usable_memory_bytes() -> int:
    """Memory that could be taken now without swapping, cut by the control group's limit."""
    available = psutil.virtual_memory().available
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, int(limit) - int(used))
    return available


def kv_pages(model: ModelConfig, total_tokens: int, max_sequences: int) -> int:
    """Pages of KV cache (fp32): what memory allows, never more than all sequences could fill.

    Raises StartupError with what would fit if not even one sequence of `total_tokens` does.
    """
    page_bytes = model.num_layers * 2 * model.num_kv_heads * PAGE_TOKENS * model.head_dim * 4
    memory = usable_memory_bytes()
    per_sequence = -(-total_tokens // PAGE_TOKENS)
    pages = min(int(memory * _KV_SHARE_OF_MEMORY) // page_bytes, per_sequence * max_sequences)
    if pages < per_sequence:
        fits = pages * PAGE_TOKENS
        raise StartupError(
            f"{total_tokens} tokens of KV cache take {per_sequence * page_bytes / 2**20:.0f} MiB, but of "
            f"{memory / 2**20:.0f} MiB usable memory it may take {_KV_SHARE_OF_MEMORY:.0%}; "
            f"--max-total-tokens {fits} would fit"
        )
    return pages


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
