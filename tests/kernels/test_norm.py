from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import activation_dtypes, assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.norm import add_rms_norm, rms_norm
from tgi_kernels.reference import norm as oracle

EPS = 1e-5
SIZES = [(0, 8), (1, 1), (1, 7), (7, 17), (33, 64), (3, 576), (2, 1000), (65, 2049)]


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_rms_norm_is_the_oracles(noise: torch.Generator, device: str, tokens: int, hidden: int) -> None:
    for dtype in activation_dtypes(device):
        x = normal(noise, tokens, hidden, dtype=dtype, device=device)
        weight = normal(noise, hidden, dtype=dtype, device=device)
        out = poisoned(tokens, hidden, dtype=dtype, device=device)
        assert rms_norm(x, weight, EPS, out) is out
        assert_near(out, oracle.rms_norm(x, weight, EPS))


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_add_rms_norm_stores_the_rounded_sum_and_normalises_that(
    noise: torch.Generator, device: str, tokens: int, hidden: int
) -> None:
    for dtype in activation_dtypes(device):
        x, residual = (normal(noise, tokens, hidden, dtype=dtype, device=device) for _ in range(2))
        weight = normal(noise, hidden, dtype=dtype, device=device)
        want, want_residual = oracle.add_rms_norm(x, residual, weight, EPS)
        out = add_rms_norm(x, residual, weight, EPS, poisoned(tokens, hidden, dtype=dtype, device=device))
        assert_same_bits(residual, want_residual)
        assert_near(out, want)


def test_rms_norm_may_write_over_its_input(noise: torch.Generator, device: str) -> None:
    dtype = activation_dtypes(device)[0]
    x, weight = (normal(noise, *shape, dtype=dtype, device=device) for shape in ((7, 100), (100,)))
    want = rms_norm(x, weight, EPS)
    assert_same_bits(rms_norm(x, weight, EPS, x), want)


def test_rms_norm_reads_rows_that_lie_apart(noise: torch.Generator, device: str) -> None:
    dtype = activation_dtypes(device)[0]
    wide, weight = (normal(noise, *shape, dtype=dtype, device=device) for shape in ((7, 300), (100,)))
    x = wide[:, 100:200]
    assert_same_bits(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))


def test_a_rows_norm_does_not_depend_on_the_other_rows(noise: torch.Generator, device: str) -> None:
    dtype = activation_dtypes(device)[0]
    x, weight = (normal(noise, *shape, dtype=dtype, device=device) for shape in ((257, 577), (577,)))
    together = rms_norm(x, weight, EPS)
    alone = torch.cat([rms_norm(row, weight, EPS) for row in x.split(1)])
    assert_same_bits(together, alone)


@pytest.mark.usefixtures("isa")
def test_norms_do_not_depend_on_the_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...]
) -> None:
    x, weight = normal(noise, 300, 577), normal(noise, 577)
    results = []
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        results.append(rms_norm(x, weight, EPS))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_a_weight_of_another_size_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[9\]; it needs \[8\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(9), EPS)


def test_half_precision_on_the_cpu_is_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match=r"convert it with \.to\(torch\.float32\)"):
        rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16), EPS)


def test_the_schemas_of_norms_tell_what_is_written(noise: torch.Generator) -> None:
    x, residual, weight = normal(noise, 3, 20), normal(noise, 3, 20), normal(noise, 20)
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS, torch.empty_like(x)))
    torch.library.opcheck(ops.add_rms_norm, (x, residual, weight, EPS, torch.empty_like(x)))
