"""Hopper's matrix products against float64, against cuBLAS bit for bit, and against each other in all batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels import activation
from tgi_kernels.hopper_matmul import gemm, matmul, skinny_matmul, takes
from tgi_kernels.matmul import linear, pack_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

DTYPES = (torch.float16, torch.bfloat16)
KERNELS = (skinny_matmul, gemm)
# [out_features, in_features]: of a layer, and odd ones.
SHAPES = (
    (4096, 4096),
    (6144, 4096),
    (14336, 512),
    (28672, 256),
    (576, 1536),
    (8192, 64),
    (1000, 136),
    (5, 8),
    (2048, 4104),
)
# Tile shapes change between these.
GEMM_TOKENS = (1, 17, 64, 65, 96, 128, 200, 256, 512, 2048)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def weight_of(out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return random(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def close_to_exact(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Its distance from float64 is at most twice that of the exact product rounded to the dtype."""
    exact = x.double() @ weight.double().T
    rounding = (exact.to(out.dtype).double() - exact).norm()
    assert out.isfinite().all()
    assert (out.double() - exact).norm() <= 2 * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 33, 64, 65, 130])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_skinny_product_is_the_float64_one_rounded(
    dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> None:
    x, weight = random(tokens, in_features, dtype=dtype), weight_of(out_features, in_features, dtype)
    out = poisoned(tokens, out_features, dtype=dtype)
    assert skinny_matmul(x, weight, out=out) is out
    close_to_exact(out, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33, 65, 129, 255, 300, 700])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_large_product_is_the_float64_one_rounded(
    dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> None:
    x, weight = random(tokens, in_features, dtype=dtype), weight_of(out_features, in_features, dtype)
    out = poisoned(tokens, out_features, dtype=dtype)
    assert gemm(x, weight, out=out) is out
    close_to_exact(out, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features", "cublas_tokens"),
    [(4096, 4096, 256), (28672, 4096, 256), (4096, 14336, 512)],
)
def test_a_tokens_bits_do_not_depend_on_its_batch_and_are_those_of_cublas(
    dtype: torch.dtype, out_features: int, in_features: int, cublas_tokens: int
) -> None:
    x, weight = random(2048, in_features, dtype=dtype), weight_of(out_features, in_features, dtype)
    many = gemm(x, weight)
    assert torch.equal(functional.linear(x[:cublas_tokens], weight), many[:cublas_tokens])
    for tokens in (1, 3, 8, 17, 64, 128):
        assert torch.equal(skinny_matmul(x[:tokens], weight), many[:tokens]), tokens
    for tokens in GEMM_TOKENS:
        assert torch.equal(gemm(x[:tokens], weight), many[:tokens]), tokens
        assert torch.equal(gemm(x[-tokens:], weight), many[-tokens:]), tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40, 65, 100, 129, 200, 257, 513, 1000])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(4096, 1024), (77, 64), (1000, 136), (6144, 72), (28672, 64)]
)
def test_both_kernels_give_one_result_for_odd_shapes_and_all_epilogues(
    dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> None:
    x, weight = random(tokens, in_features, dtype=dtype), weight_of(out_features, in_features, dtype)
    bias, residual = random(out_features, dtype=dtype), random(tokens, out_features, dtype=dtype)
    for given in (None, bias):
        for added in (None, residual):
            out = poisoned(tokens, out_features, dtype=dtype)
            want = skinny_matmul(x, weight, given, residual=added)
            assert torch.equal(gemm(x, weight, given, residual=added, out=out), want)
        if out_features % 2 == 0:
            out = poisoned(tokens, out_features // 2, dtype=dtype)
            want = skinny_matmul(x, weight, given, gate="silu")
            assert torch.equal(gemm(x, weight, given, gate="silu", out=out), want)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40, 150])
@pytest.mark.parametrize(("out_features", "in_features"), [(4096, 1024), (77, 64), (14336, 128)])
def test_bias_and_residual_round_like_separate_ops(
    kernel: Callable[..., Tensor], dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> None:
    x, weight = random(tokens, in_features, dtype=dtype), weight_of(out_features, in_features, dtype)
    bias, residual = random(out_features, dtype=dtype), random(tokens, out_features, dtype=dtype)
    plain = kernel(x, weight)
    assert torch.equal(kernel(x, weight, residual=residual), residual + plain)
    exact = x.double() @ weight.double().T + bias.double()
    biased = kernel(x, weight, bias)
    assert (biased.double() - exact).norm() <= 2 * (exact.to(dtype).double() - exact).norm()
    total = residual + biased
    assert torch.equal(kernel(x, weight, bias, residual=residual, out=residual), total)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("tokens", "inner", "in_features"),
    [(1, 14336, 512), (9, 1536, 576), (64, 100, 64), (3, 33, 8), (300, 14336, 64), (70, 200, 64)],
)
def test_a_fused_gate_gives_the_bits_of_product_then_activation(
    kernel: Callable[..., Tensor], dtype: torch.dtype, gate: str, tokens: int, inner: int, in_features: int
) -> None:
    x, weight = random(tokens, in_features, dtype=dtype), weight_of(2 * inner, in_features, dtype)
    separate = getattr(activation, f"{gate}_and_mul")(kernel(x, weight))
    assert torch.equal(kernel(x, weight, gate=gate), separate)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [6, 131])
@pytest.mark.parametrize("first", [8, 10, 11])
def test_tokens_and_outputs_may_lie_apart(kernel: Callable[..., Tensor], tokens: int, first: int) -> None:
    wide = random(tokens, 1024 + 64, dtype=torch.bfloat16)
    weight = weight_of(320, 1024, torch.bfloat16)
    out = torch.zeros(tokens, 400, dtype=torch.bfloat16, device="cuda")
    kernel(wide[:, 64:], weight, out=out[:, first : first + 320])
    close_to_exact(out[:, first : first + 320], wide[:, 64:], weight)
    assert not out[:, :first].any() and not out[:, first + 320 :].any()


@pytest.mark.parametrize("tokens", [4, 100, 300])
def test_a_chain_of_dependent_products_reads_finished_inputs(tokens: int) -> None:
    weights = [weight_of(2048, 2048, torch.bfloat16) for _ in range(24)]
    x = random(tokens, 2048, dtype=torch.bfloat16)
    slow = x
    for weight in weights:
        slow = matmul(slow, weight, residual=slow)
        torch.cuda.synchronize()
    for _ in range(20):
        fast = x
        for weight in weights:
            fast = matmul(fast, weight, residual=fast)
        assert torch.equal(fast, slow)


def test_offsets_beyond_two_to_the_31_elements_are_reached() -> None:
    tokens, inner = 140_000, 8192
    x, weight = random(tokens, 64, dtype=torch.bfloat16), weight_of(2 * inner, 64, torch.bfloat16)
    out = poisoned(tokens, 2 * inner, dtype=torch.bfloat16)
    gemm(x, weight, out=out)
    assert torch.equal(out[-100:], skinny_matmul(x[-100:], weight))
    assert not out.isnan().any()


def test_what_the_copy_engine_does_not_take_is_computed_all_the_same() -> None:
    weight = weight_of(64, 64, torch.bfloat16)
    assert takes(random(64, 64, dtype=torch.bfloat16), weight)
    assert not takes(random(4, 64, dtype=torch.float32), weight)
    for tokens in (4, 100):
        x = random(tokens, 65, dtype=torch.bfloat16)[:, 1:]
        assert not takes(x, weight)
        close_to_exact(linear(x, pack_linear(weight)), x, weight)
