"""Bits go where they do the most good, and codes of mixed widths keep products nearer than rounding does."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from tests.quantization.test_formats import Held
from tgi_kernels.quant_segments import Segments, dequantise_segments
from tgi_kernels.quant_weight import dequantise
from tgi_server.quantization.exl2 import BITS, Exl2
from tgi_server.quantize.allocate import Offer, allocate
from tgi_server.quantize.methods.exl2 import Exl2Method, packed
from tgi_server.quantize.mixed import Mixed, rounded, solve
from tgi_server.quantize.survey import Seen

WIDTHS = (6, 5, 4, 4, 3, 2)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(40, 192, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.fixture
def hessian() -> Tensor:
    """Of inputs of a few directions, as those of a network are, and of very different sizes."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(500, 24, generator=generator) @ torch.randn(24, 192, generator=generator)
    inputs = (mixed + 0.3 * torch.randn(500, 192, generator=generator)) * torch.linspace(0.05, 3, 192)
    return inputs.T @ inputs


def error(found: Tensor, weight: Tensor, hessian: Tensor) -> float:
    off = (found - weight).double()
    return float(((off @ hessian.double()) * off).sum())


def solved(weight: Tensor, hessian: Tensor, widths: tuple[int, ...] = WIDTHS) -> Mixed:
    return solve(weight, hessian, widths, (32,) * 6, hessian.diagonal().argsort(descending=True))


def test_products_lose_far_less_than_by_rounding(weight: Tensor, hessian: Tensor) -> None:
    found = solved(weight, hessian)
    parts = zip(weight[:, found.order].split(32, 1), WIDTHS, strict=True)
    nearest = torch.cat([rounded(part, bits, torch.ones(32)) for part, bits in parts], 1)
    assert error(found.dense(), weight, hessian) < 0.5 * error(
        nearest[:, found.order.argsort()], weight, hessian
    )


def test_more_bits_lose_less(weight: Tensor, hessian: Tensor) -> None:
    errors = [error(solved(weight, hessian, (bits,) * 6).dense(), weight, hessian) for bits in BITS]
    assert all(more < 0.5 * less for less, more in pairwise(errors))


@pytest.mark.parametrize("out", [40, 64])
def test_what_is_packed_is_read_as_what_was_solved(weight: Tensor, hessian: Tensor, out: int) -> None:
    found = solved(weight.repeat(2, 1)[:out], hessian)
    tensors = Held({f"m.{leaf}": tensor for leaf, tensor in packed(found).items()})
    read = Exl2(4.0).read(tensors, "m", out, 192)
    assert isinstance(read, Segments)
    assert torch.equal(dequantise_segments(read, torch.float32), found.dense())


def test_inputs_and_rows_that_are_always_zero_do_no_harm(weight: Tensor, hessian: Tensor) -> None:
    weight[3] = 0
    hessian[5:40] = 0
    hessian[:, 5:40] = 0
    found = solved(weight, hessian)
    assert bool(found.dense().isfinite().all()) and not found.dense()[3].any()
    read = Exl2(4.0).read(Held({f"m.{leaf}": t for leaf, t in packed(found).items()}), "m", 40, 192)
    assert isinstance(read, Segments) and torch.equal(dequantise_segments(read, torch.float32), found.dense())


def test_a_matrix_of_one_width_is_read_as_an_ordinary_weight(weight: Tensor, hessian: Tensor) -> None:
    found = solved(weight, hessian, (4,) * 6)
    read = Exl2(4.0).read(Held({f"m.{leaf}": t for leaf, t in packed(found).items()}), "m", 40, 192)
    assert not isinstance(read, Segments) and torch.equal(dequantise(read, torch.float32), found.dense())


# ---- how bits are shared out


def test_no_other_choice_of_as_many_bits_does_less_harm() -> None:
    """At budgets that the chosen widths use up; between them a price for all blocks cannot be better."""
    generator = torch.Generator().manual_seed(4)
    offers = {
        name: Offer(
            torch.rand(blocks, 1, generator=generator).double() * scale * 4.0 ** -torch.tensor((2, 3, 4)), 32
        )
        for name, blocks, scale in (("a", 3, 1.0), ("b", 2, 20.0))
    }
    harm = torch.cat([offer.harm for offer in offers.values()])
    for bits in (2.2, 2.6, 3.0, 3.5):
        found = [width for widths in allocate(offers, (2, 3, 4), bits).values() for width in widths]
        assert sum(found) <= bits * 5
        least = min(
            sum(float(harm[i, width - 2]) for i, width in enumerate(widths))
            for widths in product((2, 3, 4), repeat=5)
            if sum(widths) <= sum(found)
        )
        assert sum(float(harm[i, width - 2]) for i, width in enumerate(found)) == pytest.approx(least)


def test_blocks_that_all_cost_more_than_there_is_get_the_narrowest_codes() -> None:
    offers = {"a": Offer(torch.ones(2, 3).double(), 8)}
    assert allocate(offers, (2, 3, 4), 1.0) == {"a": [2, 2]}


def test_a_plan_gives_more_bits_to_what_answers_hang_on(weight: Tensor, hessian: Tensor) -> None:
    def harm(name: str, other: Tensor) -> float:
        assert other.shape == weight.shape
        return {"idle": 1e-4, "vital": 1e-1}[name]

    plan = Exl2Method(4.5).measure(Seen(name, weight, hessian, harm) for name in ("idle", "vital"))
    idle, vital = plan["idle.widths"].float(), plan["vital.widths"].float()
    assert float(vital.mean()) > float(idle.mean()) + 2
    beside = 32 / 40 + 4 / 32 + 48 / (32 * 40)  # orders, scales, groups
    assert 4.4 < float(torch.cat([idle, vital]).mean()) + beside <= 4.5
    for name in ("idle", "vital"):
        assert torch.equal(plan[f"{name}.widths"], plan[f"{name}.widths"].sort(descending=True).values)
        assert torch.equal(plan[f"{name}.order"].sort().values, torch.arange(192))
