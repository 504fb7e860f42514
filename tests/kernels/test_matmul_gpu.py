"""The skinny matrix product against float64, against cuBLAS bit for bit, and against itself in other batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels import activation
from tgi_kernels.skinny_matmul import is_skinny, skinny_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

DTYPES = (torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def close_to_exact(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Its distance from float64 is at most twice that of the exact product rounded to the dtype."""
    exact = x.double() @ weight.double().T
    rounding = (exact.to(out.dtype).double() - exact).norm()
    assert out.isfinite().all()
    assert (out.double() - exact).norm() <= 2 * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 33, 64, 65, 130])
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [
        (4096, 4096),
        (6144, 4096),
        (14336, 512),
        (28672, 256),
        (576, 1536),
        (8192, 64),
        (1000, 136),
        (5, 8),
        (2048, 4104),
    ],
)
def test_a_product_is_the_float64_one_rounded(
    dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> None:
    x = random(tokens, in_features, dtype=dtype)
    weight = random(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    out = torch.full((tokens, out_features), torch.nan, dtype=dtype, device="cuda")
    assert skinny_matmul(x, weight, out=out) is out
    close_to_exact(out, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features", "cublas_tokens"),
    [(4096, 4096, 256), (28672, 4096, 256), (4096, 14336, 512)],
)
def test_a_tokens_bits_do_not_depend_on_its_batch_and_are_those_of_cublas(
    dtype: torch.dtype, out_features: int, in_features: int, cublas_tokens: int
) -> None:
    x = random(cublas_tokens, in_features, dtype=dtype)
    weight = random(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    many = functional.linear(x, weight)
    for tokens in (1, 3, 8, 17, 64, 128):
        assert torch.equal(skinny_matmul(x[:tokens], weight), many[:tokens]), tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("out_features", "in_features"), [(4096, 1024), (77, 64), (14336, 128)])
def test_bias_and_residual_round_like_separate_ops(
    dtype: torch.dtype, tokens: int, out_features: int, in_features: int
) -> None:
    x = random(tokens, in_features, dtype=dtype)
    weight = random(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    bias, residual = random(out_features, dtype=dtype), random(tokens, out_features, dtype=dtype)
    plain = skinny_matmul(x, weight)
    assert torch.equal(skinny_matmul(x, weight, residual=residual), residual + plain)
    exact = x.double() @ weight.double().T + bias.double()
    biased = skinny_matmul(x, weight, bias)
    assert (biased.double() - exact).norm() <= 2 * (exact.to(dtype).double() - exact).norm()
    total = residual + biased
    assert torch.equal(skinny_matmul(x, weight, bias, residual=residual, out=residual), total)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("tokens", "inner", "in_features"), [(1, 14336, 512), (9, 1536, 576), (64, 100, 64), (3, 33, 8)]
)
def test_a_fused_gate_gives_the_bits_of_product_then_activation(
    dtype: torch.dtype, gate: str, tokens: int, inner: int, in_features: int
) -> None:
    x = random(tokens, in_features, dtype=dtype)
    weight = random(2 * inner, in_features, dtype=dtype, scale=in_features**-0.5)
    separate = getattr(activation, f"{gate}_and_mul")(skinny_matmul(x, weight))
    assert torch.equal(skinny_matmul(x, weight, gate=gate), separate)


def test_tokens_and_outputs_may_lie_apart() -> None:
    wide = random(6, 1024 + 64, dtype=torch.bfloat16)
    weight = random(320, 1024, dtype=torch.bfloat16, scale=0.03)
    out = torch.zeros(6, 400, dtype=torch.bfloat16, device="cuda")
    skinny_matmul(wide[:, 64:], weight, out=out[:, 10:330])
    close_to_exact(out[:, 10:330], wide[:, 64:], weight)
    assert not out[:, :10].any() and not out[:, 330:].any()


def test_a_chain_of_dependent_products_reads_finished_inputs() -> None:
    weights = [random(2048, 2048, dtype=torch.bfloat16, scale=2048**-0.5) for _ in range(24)]
    x = random(4, 2048, dtype=torch.bfloat16)
    slow = x
    for weight in weights:
        slow = skinny_matmul(slow, weight)
        torch.cuda.synchronize()
    for _ in range(50):
        fast = x
        for weight in weights:
            fast = skinny_matmul(fast, weight)
        assert torch.equal(fast, slow)


def test_only_what_the_kernel_takes_is_called_skinny() -> None:
    weight = random(64, 64, dtype=torch.bfloat16)
    assert is_skinny(random(64, 64, dtype=torch.bfloat16), weight)
    assert not is_skinny(random(65, 64, dtype=torch.bfloat16), weight)
    assert not is_skinny(random(4, 64, dtype=torch.float32), weight)
    assert not is_skinny(random(4, 65, dtype=torch.bfloat16)[:, 1:], weight)
