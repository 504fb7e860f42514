"""Copies between host and GPU that nobody waits for.

They go through pinned memory of torch's allocator, which gives none of it away again before the copy is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_server.engine.cuda_errors import named_errors
from tgi_server.engine.plan import Plan, Sampled
from tgi_server.engine.sampler import Drawn, Scored, results

_ALIGN = 16  # bytes, of each array of an upload
_DTYPES = {"int32": torch.int32, "int64": torch.int64}


def upload(device: torch.device, *arrays: NDArray[np.integer[Any]]) -> list[Tensor]:
    """Each array, int32 or int64, as a tensor of its type and shape on the device; one copy takes all."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    flat = pinned.numpy()
    for array, start in zip(arrays, starts, strict=True):
        flat[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
    there = pinned.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def download(tensor: Tensor) -> Tensor:
    """A pinned copy of a tensor on the device, under way."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Fetched:
    """A step under way, and its results on their way to the host."""

    plan: Plan
    drawn: Drawn
    scored: Mapping[int, Scored]
    done: torch.cuda.Event
    device: torch.device

    def result(self) -> list[Sampled]:
        """Wait for the step; what each work item that samples or is scored got, in the plan's order.

        Raises as `named_errors`.
        """
        with named_errors(self.device):
            self.done.synchronize()
        return results(self.plan, self.drawn, self.scored)


def fetch(plan: Plan, drawn: Drawn, scored: Mapping[int, Scored]) -> Fetched:
    """Queue the copies of a step's results behind the step."""
    there = drawn.on(download), {place: part.on(download) for place, part in scored.items()}
    done = torch.cuda.Event()
    done.record()
    return Fetched(plan, *there, done, drawn.ids.device)
