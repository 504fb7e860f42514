"""EXL2 matrices, packed bit by bit as the format is published, and the weights they stand for; slow and obvious."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.quantization.writers import bit_stream

Mix = list[tuple[int, int]]  # bits and columns of each group


@dataclass
class Exl2Matrix:
    """Codes [out, in] in the order of the groups; fine [groups, out], 1 to 16; largest [groups] float16."""

    mix: Mix
    codes: np.ndarray
    fine: np.ndarray
    largest: np.ndarray
    order: np.ndarray  # [in], the column of x of each column of codes

    def scales(self) -> np.ndarray:
        """[groups, out] float16: both products are rounded."""
        found: np.ndarray = (self.fine**2).astype(np.float16) * (self.largest / np.float16(256))[:, None]
        return found

    def dense(self) -> Tensor:
        """[out, in] float64, exact, in the order of x."""
        columns, first = [], 0
        for (bits, size), scale in zip(self.mix, self.scales(), strict=True):
            codes = self.codes[:, first : first + size].astype(np.float64) - 2 ** (bits - 1)
            columns.append(codes * scale.astype(np.float64)[:, None])
            first += size
        return torch.from_numpy(np.concatenate(columns, 1)[:, np.argsort(self.order)]).contiguous()

    def tensors(self, *, leaf: str = "q_invperm") -> dict[str, Tensor]:
        """As they are stored; rows are filled up to a multiple of 32."""
        missing = -len(self.codes) % 32
        words, groups, first, row = [], [], 0, 0
        for bits, size in self.mix:
            codes = np.pad(
                self.codes[:, first : first + size], ((0, missing), (0, 0)), constant_values=2 ** (bits - 1)
            )
            words.append(bit_stream(torch.from_numpy(codes), bits).T)
            groups += [bits, row]
            first, row = first + size, row + len(words[-1])
        fine = np.pad(self.fine - 1, ((0, 0), (0, missing)))
        order = np.argsort(self.order) if leaf == "q_invperm" else self.order
        return {
            "q_weight": torch.cat(words).contiguous(),
            "q_groups": torch.tensor(groups, dtype=torch.int16),
            "q_scale": bit_stream(torch.from_numpy(fine), 4),
            "q_scale_max": torch.from_numpy(self.largest),
            leaf: torch.from_numpy(order).int(),
        }


def random_matrix(
    mix: Mix, out: int, *, seed: int = 3, size: float = 0.15, ordered: bool = True
) -> Exl2Matrix:
    """Of weights up to about `size`; all codes there are, if there is room."""
    random = np.random.default_rng(seed)
    columns = sum(width for _, width in mix)
    order = random.permutation(columns) if ordered else np.arange(columns)
    codes = np.concatenate([random.integers(0, 1 << bits, (out, width)) for bits, width in mix], 1)
    largest = np.array([size * random.uniform(0.5, 1) / 2 ** (bits - 1) for bits, _ in mix], np.float16)
    return Exl2Matrix(mix, codes, random.integers(1, 17, (len(mix), out)), largest, order)
