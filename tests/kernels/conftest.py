"""Where kernels are tested: on the CPU with each of its instruction sets, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tgi_kernels import cpu

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each instruction set of this CPU."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield str(request.param)
    cpu.set_isa(before)


@pytest.fixture(params=[*cpu.available_isas(), CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs with each instruction set of this CPU and on the GPU; its tensors go where this says."""
    if request.param == "cuda":
        yield "cuda"
        return
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield "cpu"
    cpu.set_isa(before)


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    """Numbers of threads to compare; the one in use is put back."""
    before = cpu.num_threads()
    yield (1, 2, 5)
    cpu.set_num_threads(before)


@pytest.fixture
def noise() -> torch.Generator:
    """A generator seeded anew in every run; a failing test shows the seed."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return generator
