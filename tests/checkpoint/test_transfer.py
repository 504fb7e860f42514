"""What is loaded onto a GPU is what the files hold."""

from __future__ import annotations

import pytest
import torch

from tgi_server.checkpoint.transfer import Transfer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("shape", [(1,), (7, 13), (3, 100, 5), (1000, 999), (0, 4)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16])
def test_tensors_of_any_size_arrive_and_are_converted_as_torch_converts(
    shape: tuple[int, ...], stored: torch.dtype, wanted: torch.dtype
) -> None:
    transfer = Transfer(DEVICE, buffer_bytes=4096)
    source = torch.randn(shape).to(stored)
    into = torch.full(shape, torch.nan, dtype=wanted, device=DEVICE)
    transfer.copy(source, into)
    assert torch.equal(into.cpu(), source.to(wanted))


def test_buffers_are_not_filled_before_they_have_left() -> None:
    transfer = Transfer(DEVICE, buffer_bytes=1 << 20)
    sources = [torch.full((1 << 22,), float(i)) for i in range(8)]
    into = [torch.empty(1 << 22, device=DEVICE) for _ in sources]
    torch.cuda._sleep(1 << 28)  # the device is busy while the first copies are queued
    for source, to in zip(sources, into, strict=True):
        transfer.copy(source, to)
        source.fill_(-1)
    assert all((to == i).all() for i, to in enumerate(into))
