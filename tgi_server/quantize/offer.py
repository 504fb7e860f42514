"""What the blocks of a matrix lose with each width of codes."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tgi_server.quantize.allocate import Offer
from tgi_server.quantize.mixed import counts_of, damped, rounded
from tgi_server.quantize.solve import spread_of
from tgi_server.quantize.survey import Seen

_ROWS: Final = 64  # of a matrix, that stand for all
_TRIED: Final = 3  # bits that a matrix is tried out with: enough harm to tell it from rounding


def offer_of(seen: Seen, order: Tensor, widths: tuple[int, ...], size: int) -> Offer:
    """The harm of each width to each `size` columns of `order`, in nats of the answers' divergence.

    The matrix is tried out once. What it does is split among columns, and carried over to other widths, by the error
    of the products that is left when GPTQ has made up for what it can.
    """
    weight = seen.weight[:, order]
    hessian = seen.hessian[order][:, order]
    counts = counts_of(spread_of(damped(hessian)))
    coarse = torch.cat([rounded(part, _TRIED, one) for part, one in _blocks(weight, counts, size)], 1)
    off = coarse - weight
    tried = seen.harm(seen.name, coarse[:, order.argsort()])
    each = tried / max(float(((off @ hessian) * off).double().sum()), 1e-30)
    some = weight[torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()]
    harm = [
        [float((rounded(part, bits, one) - part).square() @ one @ torch.ones(len(some))) for bits in widths]
        for part, one in _blocks(some, counts, size)
    ]
    share = len(weight) / len(some)
    return Offer(torch.tensor(harm, dtype=torch.float64) * (each * share), len(weight) * size)


def _blocks(weight: Tensor, counts: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weight.split(size, 1), counts.split(size), strict=True))
