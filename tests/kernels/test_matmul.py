from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import activation_dtypes, assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import activation, cpu
from tgi_kernels._library import ops
from tgi_kernels.matmul import linear, pack_linear
from tgi_kernels.reference import matmul as oracle

WEIGHTS = [torch.bfloat16, torch.float32]
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 33, 241, 500]
SHAPES = [
    (1, 1),
    (7, 5),
    (32, 33),
    (100, 31),
    (257, 64),
    (576, 96),
    (1000, 70),
]  # (in_features, out_features)


def weight_of(noise: torch.Generator, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    in_features, out_features = shape
    scaled = normal(noise, out_features, in_features) * in_features**-0.5
    return scaled.to(device, dtype if device == "cpu" else activation_dtypes(device)[0])


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_oracles(
    noise: torch.Generator, device: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = weight_of(noise, shape, dtype, device)
    packed = pack_linear(weight)
    for tokens in TOKENS:
        x = normal(noise, tokens, shape[0], dtype=activation_dtypes(device)[0], device=device)
        bias = normal(noise, shape[1], dtype=x.dtype, device=device)
        for given in (None, bias):
            out = poisoned(tokens, shape[1], dtype=x.dtype, device=device)
            assert linear(x, packed, given, out=out) is out
            assert_near(out, oracle.linear(x, weight, given), times=4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", [(576, 100), (1025, 33), (2050, 17)], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_number_of_tokens(
    noise: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    packed = pack_linear(weight_of(noise, shape, dtype, "cpu"))
    x, bias = normal(noise, 500, shape[0]), normal(noise, shape[1])
    alone = torch.cat([linear(row, packed, bias) for row in x.split(1)])
    for tokens in TOKENS:
        assert_same_bits(linear(x[:tokens], packed, bias), alone[:tokens])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 3, 30, 300])
@pytest.mark.parametrize("shape", [(577, 40), (64, 3000)], ids=str)
def test_linear_does_not_depend_on_the_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...], tokens: int, shape: tuple[int, int]
) -> None:
    packed = pack_linear(weight_of(noise, shape, torch.bfloat16, "cpu"))
    x = normal(noise, tokens, shape[0])
    results = []
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        results.append(linear(x, packed))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_residual_or_a_gate_gives_the_bits_of_separate_ops(
    noise: torch.Generator, device: str, shape: tuple[int, int]
) -> None:
    in_features, half = shape
    packed = pack_linear(weight_of(noise, (in_features, 2 * half), torch.bfloat16, device))
    for tokens in (1, 5, 33, 241):
        x = normal(noise, tokens, in_features, dtype=activation_dtypes(device)[0], device=device)
        bias = normal(noise, 2 * half, dtype=x.dtype, device=device)
        residual = normal(noise, tokens, 2 * half, dtype=x.dtype, device=device)
        y = linear(x, packed, bias)
        assert_same_bits(linear(x, packed, bias, gate="silu"), activation.silu_and_mul(y))
        assert_same_bits(linear(x, packed, bias, gate="gelu"), activation.gelu_and_mul(y))
        assert_same_bits(linear(x, packed, bias, gate="gelu_tanh"), activation.gelu_tanh_and_mul(y))
        want = residual + y
        assert_same_bits(linear(x, packed, bias, residual=residual), want)
        assert linear(x, packed, bias, residual=residual, out=residual) is residual
        assert_same_bits(residual, want)


@pytest.mark.usefixtures("isa")
def test_a_bfloat16_weight_gives_the_bits_of_its_float32_copy(noise: torch.Generator) -> None:
    weight = weight_of(noise, (300, 50), torch.bfloat16, "cpu")
    for tokens in TOKENS:
        x = normal(noise, tokens, 300)
        assert_same_bits(linear(x, pack_linear(weight)), linear(x, pack_linear(weight.float())))


def test_rows_of_x_may_lie_apart(noise: torch.Generator, device: str) -> None:
    packed = pack_linear(weight_of(noise, (100, 40), torch.float32, device))
    wide = normal(noise, 9, 300, dtype=activation_dtypes(device)[0], device=device)
    x = wide[:, 100:200]
    assert_same_bits(linear(x, packed), linear(x.contiguous(), packed))


def test_a_nan_stays_in_its_row(noise: torch.Generator, device: str) -> None:
    packed = pack_linear(weight_of(noise, (64, 40), torch.float32, device))
    x = normal(noise, 20, 64, dtype=activation_dtypes(device)[0], device=device)
    x[3, 5] = float("nan")
    broken = linear(x, packed).isnan().any(dim=1)
    assert broken.nonzero().flatten().tolist() == [3]


def test_x_of_another_width_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 9\]; it needs \[tokens, 8\]"):
        linear(torch.zeros(2, 9), pack_linear(torch.zeros(4, 8)))


def test_a_residual_that_does_not_fit_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"residual has shape \[2, 3\]; it needs \[2, 4\]"):
        linear(torch.zeros(2, 8), pack_linear(torch.zeros(4, 8)), residual=torch.zeros(2, 3))


def test_a_gate_and_a_residual_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both a gate \(silu\) and a residual are given"):
        linear(torch.zeros(2, 8), pack_linear(torch.zeros(4, 8)), residual=torch.zeros(2, 4), gate="silu")


def test_a_weight_of_another_dtype_is_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match=r"weight has dtype torch.float16; .* convert it with \.to"):
        pack_linear(torch.zeros(4, 8, dtype=torch.float16))


def test_the_schemas_of_matmul_tell_what_is_written(noise: torch.Generator) -> None:
    weight = normal(noise, 40, 16)
    packed = torch.empty(2, 16, 32)
    torch.library.opcheck(ops.pack_linear, (weight, packed))
    packed = pack_linear(weight).data
    torch.library.opcheck(ops.linear, (normal(noise, 3, 16), packed, None, None, torch.empty(3, 40)))
