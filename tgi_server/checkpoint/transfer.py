"""From mapped files to a GPU, at the speed of the slower of memory and bus."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor


class Transfer:
    """Copies through two pinned buffers: one is filled, by all cores, while the other is on its way."""

    def __init__(self, device: torch.device, buffer_bytes: int = 64 << 20) -> None:
        self._device = device
        buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._turns = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])
        self._buffer_bytes = buffer_bytes

    def copy(self, source: Tensor, into: Tensor) -> None:
        """Queue a copy of `source`, on the host, `into` a tensor of its shape on the device, converted there.

        Both are contiguous. `source` may go once this returns.
        """
        if source.dtype != into.dtype:
            stored = torch.empty(source.shape, dtype=source.dtype, device=self._device)
            self.copy(source, stored)
            into.copy_(stored)
            return
        flat, there = (tensor.reshape(-1).view(torch.uint8) for tensor in (source, into))
        for part, to in zip(flat.split(self._buffer_bytes), there.split(self._buffer_bytes), strict=True):
            buffer, arrived = next(self._turns)
            arrived.synchronize()
            pinned = buffer[: len(part)].copy_(part)
            to.copy_(pinned, non_blocking=True)
            arrived.record()
