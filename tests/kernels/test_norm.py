from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import activation_dtypes, assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.columns import gather_columns
from tgi_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
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


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_layer_norm_is_the_oracles(
    noise: torch.Generator, device: str, tokens: int, hidden: int, has_bias: bool
) -> None:
    for dtype in activation_dtypes(device):
        x = 3 + normal(noise, tokens, hidden, dtype=dtype, device=device)
        weight, bias = normal(noise, 2, hidden, dtype=dtype, device=device)
        given = bias if has_bias else None
        out = poisoned(tokens, hidden, dtype=dtype, device=device)
        assert layer_norm(x, weight, given, EPS, out) is out
        # x less its mean cancels: the error is that of x, not of the result.
        assert_near(out, oracle.layer_norm(x, weight, given, EPS), times=8)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_add_layer_norm_stores_the_rounded_sum_and_normalises_that(
    noise: torch.Generator, device: str, tokens: int, hidden: int
) -> None:
    for dtype in activation_dtypes(device):
        x, residual = (normal(noise, tokens, hidden, dtype=dtype, device=device) for _ in range(2))
        weight, bias = normal(noise, 2, hidden, dtype=dtype, device=device)
        want, want_residual = oracle.add_layer_norm(x, residual, weight, bias, EPS)
        out = poisoned(tokens, hidden, dtype=dtype, device=device)
        add_layer_norm(x, residual, weight, bias, EPS, out)
        assert_same_bits(residual, want_residual)
        assert_near(out, want, times=8)


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_layer_norm_of_a_row_far_from_zero_keeps_what_is_left_of_it(
    noise: torch.Generator, device: str, spread: float
) -> None:
    dtype = activation_dtypes(device)[0]
    x = 100 + spread * normal(noise, 5, 640, dtype=dtype, device=device)
    weight, bias = normal(noise, 2, 640, dtype=dtype, device=device)
    out = layer_norm(x, weight, bias, EPS)
    exact = oracle.layer_norm(x, weight, bias, EPS)
    assert (out.double() - exact).abs().max() < 2e-2 * max(1.0, float(exact.abs().max()))
    assert out.isfinite().all()


def test_rms_norm_may_write_over_its_input(noise: torch.Generator, device: str) -> None:
    dtype = activation_dtypes(device)[0]
    x, weight = (normal(noise, *shape, dtype=dtype, device=device) for shape in ((7, 100), (100,)))
    want = rms_norm(x, weight, EPS)
    assert_same_bits(rms_norm(x, weight, EPS, x), want)
    want = layer_norm(x, weight, weight, EPS)
    assert_same_bits(layer_norm(x, weight, weight, EPS, x), want)


def test_rms_norm_reads_rows_that_lie_apart(noise: torch.Generator, device: str) -> None:
    dtype = activation_dtypes(device)[0]
    wide, weight = (normal(noise, *shape, dtype=dtype, device=device) for shape in ((7, 300), (100,)))
    x = wide[:, 100:200]
    assert_same_bits(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))
    assert_same_bits(layer_norm(x, weight, None, EPS), layer_norm(x.contiguous(), weight, None, EPS))


def test_a_rows_norm_does_not_depend_on_the_other_rows(noise: torch.Generator, device: str) -> None:
    dtype = activation_dtypes(device)[0]
    x, weight = (normal(noise, *shape, dtype=dtype, device=device) for shape in ((257, 577), (577,)))
    together = rms_norm(x, weight, EPS)
    alone = torch.cat([rms_norm(row, weight, EPS) for row in x.split(1)])
    assert_same_bits(together, alone)
    together = layer_norm(x, weight, weight, EPS)
    alone = torch.cat([layer_norm(row, weight, weight, EPS) for row in x.split(1)])
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
    with pytest.raises(ValueError, match=r"bias has shape \[9\]; it needs \[8\]"):
        layer_norm(torch.zeros(2, 8), torch.zeros(8), torch.zeros(9), EPS)
    with pytest.raises(ValueError, match=r"residual has shape \[3, 8\]; it needs \[2, 8\]"):
        add_layer_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), None, EPS)


def test_half_precision_on_the_cpu_is_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match=r"convert it with \.to\(torch\.float32\)"):
        rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16), EPS)


def test_the_schemas_of_norms_tell_what_is_written(noise: torch.Generator) -> None:
    x, residual, weight = normal(noise, 3, 20), normal(noise, 3, 20), normal(noise, 20)
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS, torch.empty_like(x)))
    torch.library.opcheck(ops.add_rms_norm, (x, residual, weight, EPS, torch.empty_like(x)))
    torch.library.opcheck(ops.layer_norm, (x, weight, weight, EPS, torch.empty_like(x)))
    torch.library.opcheck(ops.add_layer_norm, (x, residual, weight, None, EPS, torch.empty_like(x)))
    order = torch.randperm(20).int()
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS, torch.empty_like(x), order))
    torch.library.opcheck(ops.add_rms_norm, (x, residual, weight, EPS, torch.empty_like(x), order))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 7), (33, 64), (17, 577), (3, 4096)])
def test_a_norm_in_an_order_has_the_bits_of_gathering(
    noise: torch.Generator, tokens: int, hidden: int, adds: bool
) -> None:
    x, residual = normal(noise, tokens, hidden), normal(noise, tokens, hidden)
    weight, order = normal(noise, hidden), torch.randperm(hidden, generator=noise).int()
    out = poisoned(tokens, hidden)
    if adds:
        want_residual = residual.clone()
        want = add_rms_norm(x, want_residual, weight, EPS)
        add_rms_norm(x, residual, weight, EPS, out, order=order)
        assert_same_bits(residual, want_residual)
    else:
        want = rms_norm(x, weight, EPS)
        rms_norm(x, weight, EPS, out, order=order)
    assert_same_bits(out, gather_columns(want, order))


def test_an_order_that_does_not_fit_a_norm_is_refused_with_the_mend() -> None:
    x, weight, order = torch.zeros(2, 8), torch.zeros(8), torch.arange(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"order has shape \[7\]; it needs \[8\]"):
        rms_norm(x, weight, EPS, order=order[:7])
    with pytest.raises(ValueError, match=r"order has dtype torch.int64; it needs torch.int32"):
        rms_norm(x, weight, EPS, order=order.long())
    with pytest.raises(ValueError, match="order has numbers from 1 to 8; x has the columns 0 to 7"):
        rms_norm(x, weight, EPS, order=order + 1)
    with pytest.raises(ValueError, match="out is x; with an order it needs to be apart"):
        add_rms_norm(x, x.clone(), weight, EPS, x, order=order)
