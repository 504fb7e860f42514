"""Copies between host and GPU that nobody waits for: pinned buffers, used in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_server.engine.plan import Sampled

# A buffer is written again after this many steps; the engine has at most two steps under way.
TURNS = 4


class Uploads:
    """Takes the integer arrays of a step to the device in one copy."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """`capacity`: the most numbers one step can have."""
        self._device = device
        self._turns = cycle([torch.empty(capacity, dtype=torch.int64, pin_memory=True) for _ in range(TURNS)])

    def __call__(self, *arrays: NDArray[np.integer[Any]]) -> Sequence[Tensor]:
        """Each array (one-dimensional) as an int64 tensor on the device."""
        sizes = [len(array) for array in arrays]
        host = next(self._turns)[: sum(sizes)]
        np.concatenate(arrays, out=host.numpy())
        device: Tensor = host.to(self._device, non_blocking=True)
        parts: Sequence[Tensor] = device.split(sizes)
        return parts


@dataclass(frozen=True)
class Fetched:
    """Sampled ids on their way to the host: a step under way."""

    ids: Tensor  # [rows] int64, pinned
    logprobs: Tensor  # [rows] fp32, pinned
    picks: Sequence[int]  # the rows that work items sampled, in the plan's order
    done: torch.cuda.Event

    def result(self) -> list[Sampled]:
        """Wait for the step."""
        self.done.synchronize()
        ids, logprobs = self.ids.tolist(), self.logprobs.tolist()
        return [Sampled([ids[pick]], [logprobs[pick]]) for pick in self.picks]


class Downloads:
    """Fetches sampled ids and logprobs."""

    def __init__(self, rows: int) -> None:
        def pinned(dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, dtype=dtype, pin_memory=True)

        self._turns = cycle([(pinned(torch.int64), pinned(torch.float32)) for _ in range(TURNS)])

    def __call__(self, ids: Tensor, logprobs: Tensor, picks: Sequence[int]) -> Fetched:
        host_ids, host_logprobs = (buffer[: len(ids)] for buffer in next(self._turns))
        host_ids.copy_(ids, non_blocking=True)
        host_logprobs.copy_(logprobs, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Fetched(host_ids, host_logprobs, picks, done)
