"""Columns in another order: nothing is computed, so every bit is compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import CUDA
from tgi_kernels._library import ops
from tgi_kernels.columns import gather_columns
from tgi_kernels.reference import columns as reference

TOKENS = [1, 3, 16, 17, 33, 513]


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def an_order(device: str, columns: int) -> Tensor:
    return torch.randperm(columns, device=device).int()


def poisoned(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, device=like.device, dtype=like.dtype)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 33, 136, 577, 4096, 14336, 28680])
def test_gathered_columns_are_the_oracles(device: str, dtype: torch.dtype, columns: int) -> None:
    for tokens in TOKENS:
        x, order = random(device, dtype, tokens, columns), an_order(device, columns)
        out = poisoned(x, tokens, columns)
        assert gather_columns(x, order, out) is out
        assert torch.equal(out, reference.gather_columns(x, order))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_columns_may_be_gathered_from_rows_that_lie_apart_and_more_or_less_than_once(device: str) -> None:
    wide = random(device, torch.bfloat16, 9, 1000)
    for start in (0, 3, 8):
        x = wide[:, start : start + 640]
        for count in (16, 100, 1928):
            order = torch.randint(0, 640, (count,), device=device).int()
            assert torch.equal(gather_columns(x, order), reference.gather_columns(x, order))


def test_an_index_out_of_range_is_an_error_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="order has numbers from 8 to 8; x has the columns 0 to 7"):
        gather_columns(torch.zeros(1, 8), torch.tensor([8], dtype=torch.int32))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("columns", [8, 33, 4096])
def test_an_index_out_of_range_gives_nan_on_the_gpu(device: str, columns: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, order = random(device, dtype, 3, columns), an_order(device, columns)
        order[1], order[4], order[5] = -1, columns, 2**31 - 1
        bad = [i in (1, 4, 5) for i in range(columns)]
        assert gather_columns(x, order).isnan().tolist() == [bad] * 3


@pytest.mark.parametrize("device", [CUDA])
def test_an_order_of_another_type_or_a_result_of_another_shape_is_refused(device: str) -> None:
    x, order = random(device, torch.bfloat16, 2, 8), an_order(device, 8)
    with pytest.raises(ValueError, match=r"order has dtype torch.int64; it needs torch.int32"):
        gather_columns(x, order.long())
    with pytest.raises(ValueError, match=r"out has shape \[3, 8\]; it needs \[2, 8\]"):
        gather_columns(x, order, x.new_empty(3, 8))


@pytest.mark.parametrize("device", [CUDA])
def test_the_schema_of_gathering_tells_what_is_written(device: str) -> None:
    x, order = random(device, torch.bfloat16, 3, 40), an_order(device, 40)
    torch.library.opcheck(ops.gather_columns, (x, order, torch.empty_like(x)))
