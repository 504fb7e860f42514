"""Norms on GPUs that write in another order: the bits of a norm whose columns are gathered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import CUDA
from tests.kernels.test_columns import TOKENS, an_order, poisoned, random
from tgi_kernels import norm
from tgi_kernels.columns import gather_columns
from tgi_kernels.reference import columns as reference

EPS = 1e-5


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [64, 576, 1000, 4096, 14336, 16392, 33, 20001])
def test_a_norm_in_an_order_has_the_bits_of_gathering_on_the_gpu(
    device: str, dtype: torch.dtype, hidden: int
) -> None:
    weight, order = random(device, dtype, hidden), an_order(device, hidden)
    for tokens in TOKENS:
        x, residual = random(device, dtype, 2, tokens, hidden)
        want = reference.gather_columns(norm.rms_norm(x, weight, EPS), order)
        out = poisoned(x, tokens, hidden)
        assert torch.equal(norm.rms_norm(x, weight, EPS, out, order=order), want)
        sums = residual.clone()
        want = reference.gather_columns(norm.add_rms_norm(x, sums, weight, EPS), order)
        out = poisoned(x, tokens, hidden)
        assert torch.equal(norm.add_rms_norm(x, residual, weight, EPS, out, order=order), want)
        assert torch.equal(residual, sums)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("tokens", [1, 40])
def test_ordered_norms_and_gathering_follow_each_other_in_graphs(device: str, tokens: int) -> None:
    x, weight, order = (
        random(device, torch.bfloat16, tokens, 4096),
        random(device, torch.bfloat16, 4096),
        an_order(device, 4096),
    )

    def chain(x: Tensor) -> Tensor:
        for _ in range(8):
            x = gather_columns(norm.rms_norm(x, weight, EPS, order=order), order)
        return x

    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(3):
        x.copy_(random(device, torch.bfloat16, tokens, 4096))
        out.fill_(torch.nan)
        graph.replay()
        want = x
        for _ in range(8):
            want = norm.rms_norm(want, weight, EPS)[:, order.long()][:, order.long()]
        assert torch.equal(out, want)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("hidden", [8, 33, 4096])
def test_an_index_out_of_range_gives_nan_there_alone(device: str, hidden: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, order = random(device, dtype, 3, hidden), an_order(device, hidden)
        order[1], order[4], order[5] = -1, hidden, 2**31 - 1
        bad = [i in (1, 4, 5) for i in range(hidden)]
        assert norm.rms_norm(x, x[0], EPS, order=order).isnan().tolist() == [bad] * 3
