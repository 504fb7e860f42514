"""Greedy choice on the GPU against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from tgi_kernels import sampling
from tgi_kernels.reference import sampling as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 49152, 50257, 128256, 262144])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_greedy_is_the_first_largest_logit_and_its_log_probability(
    dtype: torch.dtype, vocab: int, rows: int
) -> None:
    logits = (torch.randn(rows, vocab, device="cuda") * 3).to(dtype)
    ids, logprobs = sampling.greedy(logits)
    exact_ids, exact = reference.greedy(logits)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(logprobs.double(), exact, rtol=2e-6, atol=2e-6)


def test_of_equal_logits_the_lowest_id_wins() -> None:
    logits = torch.zeros(4, 128256, device="cuda")
    logits[1, 77777] = logits[1, 128255] = 1.0
    logits[2, 16031] = logits[2, 16032] = 1.0
    logits[3] = -torch.inf
    logits[3, 5] = -3.0
    ids, logprobs = sampling.greedy(logits)
    assert ids.tolist() == [0, 77777, 16031, 5]
    assert logprobs[3] == 0.0


def test_a_row_that_cannot_be_trusted_has_logprob_nan_and_a_valid_id() -> None:
    logits = torch.randn(5, 4096, device="cuda")
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 9] = torch.nan
    logits[2, 10] = 50.0
    logits[3, 11] = torch.inf
    ids, logprobs = sampling.greedy(logits)
    assert ids.tolist()[:4] == [0, 0, 10, 11]
    assert logprobs.isnan().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_choice_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    logits = torch.randn(65, 128256, device="cuda").to(dtype)
    _, together = sampling.greedy(logits)
    alone = torch.cat([sampling.greedy(row[None])[1] for row in logits])
    assert torch.equal(together, alone)
