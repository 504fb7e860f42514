from __future__ import annotations

from pathlib import Path

import torch

from tgi_server.checkpoint.dummy import DummyCheckpoint
from tgi_server.layers.weights import Weights

CPU = torch.device("cpu")


def weights(dtype: torch.dtype) -> Weights:
    return Weights(DummyCheckpoint(Path(), CPU, torch.bfloat16), CPU, dtype)


def test_a_matrix_that_is_on_the_device_in_its_type_is_not_copied() -> None:
    """A copy of Llama's head is 1 GiB of a GPU, and stays the allocator's once it is dropped."""
    matrix = weights(torch.bfloat16).stored("head", 6, 5)
    assert weights(torch.bfloat16).on_device(matrix) is matrix


def test_matrices_become_rows_of_one_in_the_type_that_is_computed_in() -> None:
    parts = [weights(torch.bfloat16).stored(name, 3, 5) for name in "ab"]
    assert torch.equal(weights(torch.float16).on_device(*parts), torch.cat(parts).half())
    assert torch.equal(weights(torch.float16).on_device(parts[0]), parts[0].half())
