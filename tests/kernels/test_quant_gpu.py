"""Products with weights of a few bits on a GPU: exact weights, cuBLAS's error, and the same bits whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.compare import assert_near, assert_same_bits
from tests.kernels.test_quant import exact, random_weight
from tgi_kernels.matmul import linear, pack_linear
from tgi_kernels.quant import pack_quant, quant_linear
from tgi_kernels.quant_cuda import PackedCuda, dequantise_packed, pack_cuda, quant_matmul
from tgi_kernels.quant_size import FUSED_PIECES_TOKENS, FUSED_RUNS_TOKENS
from tgi_kernels.quant_weight import QuantWeight, Values, dequantise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

TYPES = [(torch.float16, torch.float16), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.bfloat16)]
# Both sides of every border between kernels, blocks of tokens and ways to spread work.
TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 193, 256, 257, 299, 300)
# in_features, out_features, group size: ranges of columns from one to eight, groups of one to all columns' chunks,
# rows and columns that fill no strip and no piece.
SHAPES = [
    (64, 64, 64),
    (96, 70, 48),
    (160, 72, 16),
    (200, 130, 200),
    (576, 100, 576),
    (576, 960, 64),
    (1536, 576, 32),
    (512, 20000, 128),
    (4096, 4096, 128),
    (14336, 200, 128),
    (28672, 64, 64),
]
LARGE = [(4096, 28672, 128), (14336, 4096, 128), (4096, 6144, 4096), (8192, 28672, 128)]


def on_gpu(weight: QuantWeight, dtype: torch.dtype) -> PackedCuda:
    return pack_cuda(weight.to(torch.device("cuda")), dtype)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def poisoned(tokens: int, packed: PackedCuda) -> Tensor:
    return torch.full((tokens, packed.out_features), torch.nan, dtype=packed.dtype, device="cuda")


@pytest.mark.parametrize(("dtype", "scale"), TYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(96, 70, 32), (40, 64, 40), (576, 128, 64), (128, 200, 16)], ids=str)
def test_weights_are_exact_and_rounded_once(
    noise: torch.Generator, shape: tuple[int, int, int], bits: int, dtype: torch.dtype, scale: torch.dtype
) -> None:
    weight = random_weight(noise, shape, bits, scale)
    assert torch.equal(dequantise_packed(on_gpu(weight, dtype)).cpu(), exact(weight).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_scale_of_fp16_is_split_exactly(dtype: torch.dtype, bits: int) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scales = every[every.isfinite()]
    codes = torch.randint(0, 1 << bits, (len(scales), 64), dtype=torch.uint8)
    codes[:, :16] = torch.arange(16, dtype=torch.uint8) * (1 if bits == 4 else 17)
    zeros = torch.randint(0, (1 << bits) + 1, (len(scales), 1), dtype=torch.int16)
    weight = QuantWeight(codes, scales[:, None], zeros, 64, bits)
    assert torch.equal(dequantise_packed(on_gpu(weight, dtype)).cpu(), dequantise(weight, dtype))


def assert_near_oracle(got: Tensor, x: Tensor, weight: QuantWeight) -> None:
    """Fails if `got` errs more than 1.5 times what cuBLAS does on weights rounded to x's dtype."""
    whole = weight.to(torch.device("cuda"))
    groups = (whole.codes.shape[1] // whole.group_size, whole.group_size)
    assert whole.zeros is not None
    codes = whole.codes.unflatten(1, groups).double() - whole.zeros.unsqueeze(2)
    exact_weight = (codes * whole.scales.double().unsqueeze(2)).flatten(1)
    want = x.double() @ exact_weight.T
    theirs = functional.linear(x, exact_weight.to(x.dtype)).double()
    allowed = 1.5 * (theirs - want).abs().max().item()
    error = (got.double() - want).abs().max().item()
    assert error <= allowed, f"the largest error is {error:.3g}; cuBLAS allows {allowed:.3g}"


def assert_rows_alone_have_the_same_bits(packed: PackedCuda, x: Tensor, whole: Tensor) -> None:
    """Whatever number of tokens, and whichever tokens are beside it, a token's bits are those in `whole`."""
    for tokens in TOKENS:
        first = (7 * tokens) % (len(x) - tokens + 1)
        out = poisoned(tokens, packed)
        assert quant_matmul(x[first : first + tokens], packed, out=out) is out
        assert_same_bits(out, whole[first : first + tokens])


@pytest.mark.parametrize(("dtype", "scale"), TYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_as_exact_as_cublas_and_its_bits_are_those_of_any_number_of_tokens(
    noise: torch.Generator, shape: tuple[int, int, int], bits: int, dtype: torch.dtype, scale: torch.dtype
) -> None:
    weight = random_weight(noise, shape, bits, scale)
    packed, x = on_gpu(weight, dtype), random(max(TOKENS), shape[0], dtype=dtype)
    whole = quant_matmul(x, packed)
    assert_near_oracle(whole, x, weight)
    assert_rows_alone_have_the_same_bits(packed, x, whole)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_the_same_holds_for_matrices_of_large_models(
    noise: torch.Generator, shape: tuple[int, int, int]
) -> None:
    weight = random_weight(noise, shape)
    packed, x = on_gpu(weight, torch.bfloat16), random(2048, shape[0], dtype=torch.bfloat16)
    whole = quant_matmul(x, packed)
    assert_near_oracle(whole, x, weight)
    assert_rows_alone_have_the_same_bits(packed, x, whole)


def test_every_number_of_tokens_up_to_300_gives_the_same_bits(noise: torch.Generator) -> None:
    packed = on_gpu(random_weight(noise, (1536, 576, 128)), torch.bfloat16)
    x = random(300, 1536, dtype=torch.bfloat16)
    whole = quant_matmul(x, packed)
    for tokens in range(1, 301):
        assert_same_bits(quant_matmul(x[:tokens], packed, out=poisoned(tokens, packed)), whole[:tokens])


@pytest.mark.parametrize("tokens", [1, 16, 100, 513])
def test_bias_and_residual_are_rounded_as_separate_ops(noise: torch.Generator, tokens: int) -> None:
    weight = random_weight(noise, (576, 200, 64))
    packed = on_gpu(weight, torch.bfloat16)
    x, bias = random(tokens, 576, dtype=torch.bfloat16), random(200, dtype=torch.bfloat16) * 8
    residual = random(tokens, 200, dtype=torch.bfloat16)
    biased = quant_matmul(x, packed, bias)
    assert_near(biased, x.double() @ dequantise(weight, torch.bfloat16).cuda().double().T + bias.double())
    total = residual.clone()
    assert quant_matmul(x, packed, bias, residual=total, out=total) is total
    assert_same_bits(total, residual + biased)


def test_rows_of_x_and_out_may_lie_apart(noise: torch.Generator) -> None:
    packed = on_gpu(random_weight(noise, (576, 192, 64)), torch.bfloat16)
    x = random(70, 1024, dtype=torch.bfloat16)[:, 64:640]
    wide = torch.full((70, 400), torch.nan, dtype=torch.bfloat16, device="cuda")
    quant_matmul(x, packed, out=wide[:, 100:292])
    assert_same_bits(wide[:, 100:292], quant_matmul(x.contiguous(), packed))
    assert wide[:, :100].isnan().all() and wide[:, 292:].isnan().all()


def test_rows_that_the_copy_engine_cannot_take_are_multiplied_all_the_same(noise: torch.Generator) -> None:
    weight = random_weight(noise, (75, 64, 75))
    packed, x = on_gpu(weight, torch.bfloat16), random(9, 75, dtype=torch.bfloat16)
    want = x.double().cpu() @ dequantise(weight, torch.bfloat16).double().T
    torch.testing.assert_close(quant_matmul(x, packed).double().cpu(), want, rtol=0.01, atol=0.02)


def test_columns_in_another_order_meet_their_own_x(noise: torch.Generator) -> None:
    weight = random_weight(noise, (192, 64, 64), ordered=True)
    packed = on_gpu(weight, torch.bfloat16)
    for tokens in (1, 40, 200):
        x = random(tokens, 192, dtype=torch.bfloat16)
        want = x.double().cpu() @ dequantise(weight, torch.bfloat16).double().T
        torch.testing.assert_close(quant_matmul(x, packed).double().cpu(), want, rtol=0.01, atol=0.02)


def test_a_nan_stays_in_its_row(noise: torch.Generator) -> None:
    packed = on_gpu(random_weight(noise, (96, 64, 32)), torch.bfloat16)
    x = random(100, 96, dtype=torch.bfloat16)
    x[70, 5] = torch.nan
    assert quant_matmul(x, packed).isnan().any(dim=1).nonzero().flatten().tolist() == [70]


def test_a_product_is_captured_in_a_graph(noise: torch.Generator) -> None:
    packed = on_gpu(random_weight(noise, (576, 192, 64)), torch.bfloat16)
    x = random(3, 576, dtype=torch.bfloat16)
    want, out = quant_matmul(x, packed), poisoned(3, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            quant_matmul(x, packed, out=out)
    graph.replay()
    assert_same_bits(out, want)


@pytest.mark.parametrize("values", ["integer", "nf4"])
def test_many_tokens_take_the_dense_matrix_unless_bits_may_not_depend_on_their_number(
    noise: torch.Generator, values: Values
) -> None:
    """Made anew for each product: one that read it too early would see that of another weight."""
    weights = [
        random_weight(
            noise, (1024, 1536, 64), 4, values=values, shift="zeros" if values == "integer" else "none"
        )
        for _ in range(3)
    ]
    on_device = [weight.to(torch.device("cuda")) for weight in weights]
    most = FUSED_PIECES_TOKENS if values == "integer" else FUSED_RUNS_TOKENS
    x = random(most + 1, 1024, dtype=torch.bfloat16)
    residual = random(most + 1, 1536, dtype=torch.bfloat16)
    quick = [pack_quant(weight, torch.bfloat16) for weight in on_device]
    for _ in range(20):
        got = [quant_linear(x, packed, residual=residual) for packed in quick]
        gated = [quant_linear(x, packed, gate="silu") for packed in quick]
        for weight, y, z in zip(on_device, got, gated, strict=True):
            dense = pack_linear(dequantise(weight, torch.bfloat16))
            assert_same_bits(y, linear(x, dense, residual=residual))
            assert_same_bits(z, linear(x, dense, gate="silu"))
    same = pack_quant(on_device[0], torch.bfloat16, deterministic=True)
    assert_same_bits(quant_linear(x, same)[:5], quant_linear(x[:5], same))
    assert_same_bits(quant_linear(x[:most], quick[0]), quant_linear(x, same)[:most])
