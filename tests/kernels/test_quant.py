"""Weights of a few bits: dequantised exactly, and multiplied with the bits of their dense product."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.matmul import linear, pack_linear
from tgi_kernels.quant import pack_quant, quant_linear
from tgi_kernels.quant_weight import QuantWeight, Values, dequantise, table
from tgi_kernels.reference import quant as oracle

TOKENS = [0, 1, 2, 5, 6, 7, 16, 33, 241]
# in_features, out_features, group size
SHAPES = [
    (1, 1, 1),
    (7, 5, 7),
    (31, 33, 31),
    (24, 40, 8),
    (96, 100, 32),
    (576, 64, 64),
    (257, 65, 257),
    (1152, 31, 128),
]


def random_weight(
    noise: torch.Generator,
    shape: tuple[int, int, int],
    bits: int = 4,
    scale: torch.dtype = torch.float16,
    *,
    ordered: bool = False,
) -> QuantWeight:
    """Every code and zero point there is, scales of both signs."""
    in_features, out_features, group_size = shape
    groups = in_features // group_size
    return QuantWeight(
        torch.randint(0, 1 << bits, (out_features, in_features), generator=noise, dtype=torch.uint8),
        (normal(noise, out_features, groups) * 0.02).to(scale),
        torch.randint(0, (1 << bits) + 1, (out_features, groups), generator=noise, dtype=torch.int16),
        group_size,
        bits,
        torch.randperm(in_features, generator=noise) if ordered else None,
    )


def exact(weight: QuantWeight) -> torch.Tensor:
    return oracle.dequantise(weight.codes, weight.scales, weight.zeros, weight.group_size, weight.order)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantising_is_exact_and_rounds_once(
    noise: torch.Generator, bits: int, dtype: torch.dtype, scale: torch.dtype
) -> None:
    weight = random_weight(noise, (96, 64, 32), bits, scale, ordered=True)
    # Every code beside every zero point.
    weight.codes[:, :32] = (torch.arange(32) * (1 if bits == 4 else 8) % (1 << bits)).to(torch.uint8)
    want = exact(weight)
    assert torch.equal(want.float().double(), want), "float32 holds every weight"
    assert_same_bits(dequantise(weight, dtype), want.to(dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_has_the_bits_of_the_dense_one(
    noise: torch.Generator, bits: int, shape: tuple[int, int, int]
) -> None:
    weight = random_weight(noise, shape, bits)
    packed, dense = pack_quant(weight), pack_linear(dequantise(weight, torch.float32))
    for tokens in TOKENS:
        x, bias = normal(noise, tokens, shape[0]), normal(noise, shape[1])
        for given in (None, bias):
            out = poisoned(tokens, shape[1])
            assert quant_linear(x, packed, given, out=out) is out
            assert_same_bits(out, linear(x, dense, given))
            total = normal(noise, tokens, shape[1])
            want = linear(x, dense, given, residual=total)
            quant_linear(x, packed, given, residual=total, out=total)
            assert_same_bits(total, want)
            assert_near(out, oracle.quant_linear(x, exact(weight), given), times=4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16], ids=str)
def test_columns_in_another_order_meet_their_own_x(noise: torch.Generator, scale: torch.dtype) -> None:
    weight = random_weight(noise, (96, 40, 32), 4, scale, ordered=True)
    packed = pack_quant(weight)
    for tokens in TOKENS:
        x = normal(noise, tokens, 96)
        assert_near(quant_linear(x, packed), oracle.quant_linear(x, exact(weight)), times=4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 3, 30, 300])
def test_the_product_does_not_depend_on_the_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...], tokens: int
) -> None:
    packed = pack_quant(random_weight(noise, (512, 200, 128)))
    x = normal(noise, tokens, 512)
    results = []
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        results.append(quant_linear(x, packed))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_rows_of_x_may_lie_apart(noise: torch.Generator) -> None:
    packed = pack_quant(random_weight(noise, (96, 40, 32)))
    x = normal(noise, 9, 300)[:, 100:196]
    assert_same_bits(quant_linear(x, packed), quant_linear(x.contiguous(), packed))


def test_groups_that_do_not_cover_the_columns_are_refused_with_the_numbers(noise: torch.Generator) -> None:
    weight = random_weight(noise, (96, 4, 32))
    with pytest.raises(ValueError, match="groups of 36 do not cover 96 columns"):
        QuantWeight(weight.codes, weight.scales, weight.zeros, 36, 4)
    with pytest.raises(ValueError, match="groups of 12 columns"):
        QuantWeight(weight.codes, weight.scales, weight.zeros, 12, 4)
    with pytest.raises(ValueError, match="codes of 9 bits"):
        QuantWeight(weight.codes, weight.scales, weight.zeros, 32, 9)


def test_a_weight_of_a_table_has_no_zeros(noise: torch.Generator) -> None:
    weight = random_weight(noise, (96, 4, 32))
    with pytest.raises(ValueError, match="only integers have zeros"):
        QuantWeight(weight.codes, weight.scales, weight.zeros, 32, 4, values="nf4")


@pytest.mark.parametrize("values", ["nf4", "fp4", "e2m1"])
def test_values_of_tables_are_scaled_and_rounded_once(noise: torch.Generator, values: Values) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    scales = normal(noise, 3, 2)
    weight = QuantWeight(codes, scales, None, 16, 4, values=values)
    want = table(values).double()[codes.long()] * scales.double().repeat_interleave(16, 1)
    assert_same_bits(dequantise(weight, torch.float32), want.float())
    assert_same_bits(dequantise(weight, torch.bfloat16), want.float().bfloat16())


def test_offsets_are_added_before_the_rounding(noise: torch.Generator) -> None:
    codes = torch.randint(0, 64, (5, 32), generator=noise, dtype=torch.uint8)
    scales, offsets = normal(noise, 5, 2), normal(noise, 5, 2)
    weight = QuantWeight(codes, scales, None, 16, 6, offsets=offsets)
    want = codes.double() * scales.double().repeat_interleave(16, 1) + offsets.double().repeat_interleave(
        16, 1
    )
    assert_same_bits(dequantise(weight, torch.float32), want.float())


def test_x_of_another_width_is_refused_with_both_shapes(noise: torch.Generator) -> None:
    packed = pack_quant(random_weight(noise, (96, 4, 32)))
    with pytest.raises(ValueError, match=r"x has shape \[2, 9\]; it needs \[tokens, 96\]"):
        quant_linear(torch.zeros(2, 9), packed)


def test_the_schema_tells_what_is_written(noise: torch.Generator) -> None:
    packed = pack_quant(random_weight(noise, (96, 40, 32)))
    arguments = (packed.words, packed.scales, packed.offsets, 4, 32, None, None)
    torch.library.opcheck(ops.quant_linear, (normal(noise, 3, 96), *arguments, torch.empty(3, 40)))
