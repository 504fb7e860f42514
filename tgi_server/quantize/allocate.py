"""How many bits each part of a model gets, so that they are as many as asked on average and do the least harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_HALVINGS: Final = 100  # of the price of a bit: more than float64 tells apart


@dataclass(frozen=True)
class Offer:
    """harm: [blocks, widths] float64, of each block with each width. weights: how many a block has."""

    harm: Tensor
    weights: int


def allocate(offers: Mapping[str, Offer], widths: tuple[int, ...], bits: float) -> dict[str, list[int]]:
    """The width of each block, at most `bits` a weight in all, or the narrowest if even those are more.

    Every block takes the width whose harm and bits cost least at one price of a bit for all (Lagrange); the price
    is halved in.
    """
    budget = bits * sum(len(offer.harm) * offer.weights for offer in offers.values())
    low, high = -60.0, 60.0  # of the price, as a power of two
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _cost(offers, widths, middle) > budget:
            low = middle
        else:
            high = middle
    return {
        name: [widths[i] for i in _chosen(offer, widths, high).tolist()] for name, offer in offers.items()
    }


def _chosen(offer: Offer, widths: tuple[int, ...], price: float) -> Tensor:
    paid = torch.tensor(widths, dtype=torch.float64) * (offer.weights * 2.0**price)
    chosen: Tensor = (offer.harm + paid).argmin(1)
    return chosen


def _cost(offers: Mapping[str, Offer], widths: tuple[int, ...], price: float) -> float:
    """Bits in all."""
    each = torch.tensor(widths, dtype=torch.float64)
    return sum(float(each[_chosen(offer, widths, price)].sum()) * offer.weights for offer in offers.values())
