"""Codes found with the inputs' statistics keep products nearer to the originals than rounded ones do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tgi_kernels.quant_weight import dequantise
from tgi_server.quantize.grid import Grid
from tgi_server.quantize.solve import Codes, gptq, nearest

GRIDS = [
    Grid(4, 32, is_symmetric=True, orders_columns=False),
    Grid(4, 32, is_symmetric=False, orders_columns=True),
    Grid(3, -1, is_symmetric=True, orders_columns=True),
    Grid(2, 64, is_symmetric=False, orders_columns=False),
    Grid(8, 192, is_symmetric=True, orders_columns=False),
]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.fixture
def inputs() -> Tensor:
    """Of a few directions, as those of a network are, and of very different sizes."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(500, 24, generator=generator) @ torch.randn(24, 192, generator=generator)
    return (mixed + 0.3 * torch.randn(500, 192, generator=generator)) * torch.linspace(0.05, 3, 192)


def error(codes: Codes, weight: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (codes.dense() - weight).T).norm())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_loses_less_of_the_products_than_rounding(grid: Grid, weight: Tensor, inputs: Tensor) -> None:
    found = gptq(weight, inputs.T @ inputs, grid)
    assert error(found, weight, inputs) < 0.8 * error(nearest(weight, grid), weight, inputs)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_codes_fit_their_format(grid: Grid, method: str, weight: Tensor, inputs: Tensor) -> None:
    codes = nearest(weight, grid) if method == "nearest" else gptq(weight, inputs.T @ inputs, grid)
    assert int(codes.codes.max()) < 1 << grid.bits
    assert torch.equal(codes.group_of.bincount(), torch.full((192 // grid.size(192),), grid.size(192)))
    if grid.is_symmetric:
        assert bool((codes.zeros == 1 << (grid.bits - 1)).all())
    else:
        assert int(codes.zeros.min()) >= 1
    assert torch.equal(dequantise(codes.stored(grid.bits), torch.float32), codes.dense())


def test_rounding_takes_the_nearest_code(weight: Tensor) -> None:
    codes = nearest(weight, Grid(8, 32, is_symmetric=False, orders_columns=False))
    scales = codes.scales.float()[:, codes.group_of]
    inside = (codes.codes > 0) & (codes.codes < 255)
    assert bool(((codes.dense() - weight).abs() <= 0.501 * scales)[inside].all())


def test_inputs_that_are_always_zero_do_no_harm(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 5:40] = 0
    codes = gptq(weight, inputs.T @ inputs, GRIDS[0])
    assert error(codes, weight, inputs) < error(nearest(weight, GRIDS[0]), weight, inputs)
