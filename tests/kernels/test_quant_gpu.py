"""Products with weights of a few bits on a GPU: exact weights, the bits of the dense product, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import assert_same_bits
from tests.kernels.test_quant import exact, random_weight
from tgi_kernels.hopper_matmul import matmul
from tgi_kernels.quant_cuda import PackedCuda, dequantise_packed, pack_cuda, quant_matmul
from tgi_kernels.quant_weight import QuantWeight, dequantise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

TYPES = [(torch.float16, torch.float16), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.bfloat16)]
TOKENS = (1, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 256, 300, 1000)
# in_features, out_features, group size
SHAPES = [
    (64, 64, 64),
    (96, 70, 32),
    (576, 960, 64),
    (80, 1, 80),
    (1536, 576, 128),
    (336, 200, 48),
    (2048, 192, 2048),
    (512, 20000, 128),
    (14336, 64, 128),
]


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


@pytest.mark.parametrize(("dtype", "scale"), TYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_has_the_bits_of_the_dense_one_for_any_number_of_tokens(
    noise: torch.Generator, shape: tuple[int, int, int], bits: int, dtype: torch.dtype, scale: torch.dtype
) -> None:
    weight = random_weight(noise, shape, bits, scale)
    packed, dense = on_gpu(weight, dtype), dequantise(weight, dtype).cuda()
    x = random(max(TOKENS), shape[0], dtype=dtype)
    want = matmul(x, dense)  # its own bits do not depend on the number of tokens
    oracle = x.double() @ dense.double().T
    rounding = (oracle.to(dtype).double() - oracle).norm()
    assert (want.double() - oracle).norm() <= 2 * rounding
    for tokens in TOKENS:
        out = poisoned(tokens, packed)
        assert quant_matmul(x[:tokens], packed, out=out) is out
        assert_same_bits(out, want[:tokens])


@pytest.mark.parametrize("tokens", [1, 16, 100, 513])
def test_bias_and_residual_are_rounded_as_separate_ops(noise: torch.Generator, tokens: int) -> None:
    weight = random_weight(noise, (576, 200, 64))
    packed = on_gpu(weight, torch.bfloat16)
    dense = dequantise(weight, torch.bfloat16).cuda()
    x, bias = random(tokens, 576, dtype=torch.bfloat16), random(200, dtype=torch.bfloat16)
    residual = random(tokens, 200, dtype=torch.bfloat16)
    want = matmul(x, dense, bias)
    assert_same_bits(quant_matmul(x, packed, bias), want)
    total = residual.clone()
    assert quant_matmul(x, packed, bias, residual=total, out=total) is total
    assert_same_bits(total, residual + want)


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
