"""Weights of a few bits: dequantised exactly, and multiplied with the bits of their dense product."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.activation import Gate
from tgi_kernels.matmul import linear, pack_linear
from tgi_kernels.quant import fits_kernels, pack_quant, quant_linear
from tgi_kernels.quant_cpu import pack_cpu
from tgi_kernels.quant_weight import BITS, QuantWeight, Values, dequantise, table
from tgi_kernels.reference import quant as oracle

TOKENS = [0, 1, 2, 7, 33]
# in_features, out_features, group size
SHAPES = [
    (1, 1, 1),
    (7, 5, 7),
    (31, 33, 31),
    (24, 40, 8),
    (96, 100, 32),
    (112, 33, 16),
    (576, 64, 64),
    (257, 65, 257),
    (1152, 31, 128),
]


# Bits, dtype of scales, what codes stand for, what shifts them.
Kind = tuple[int, torch.dtype, Values, str]
KINDS: list[Kind] = [
    *((bits, torch.float16, "integer", "zeros") for bits in range(2, 9)),
    *((bits, torch.float32, "integer", "zeros") for bits in range(2, 9)),
    *((bits, torch.bfloat16, "integer", "offsets") for bits in range(2, 9)),
    (4, torch.float16, "integer", "small offsets"),
    (4, torch.bfloat16, "integer", "one zero"),
    (8, torch.float32, "integer", "one zero"),
    (6, torch.float32, "integer", "nothing"),
    (4, torch.float32, "nf4", "nothing"),
    (4, torch.float16, "nf4", "offsets"),
    (4, torch.float32, "fp4", "nothing"),
    (4, torch.bfloat16, "e2m1", "nothing"),
    (8, torch.float32, "e4m3", "nothing"),
    (8, torch.bfloat16, "e4m3", "nothing"),
]


def random_weight(
    noise: torch.Generator,
    shape: tuple[int, int, int],
    bits: int = 4,
    scale: torch.dtype = torch.float16,
    values: Values = "integer",
    shift: str = "zeros",
    *,
    ordered: bool = False,
) -> QuantWeight:
    """Every code and zero point there is but NaN, scales of both signs."""
    in_features, out_features, group_size = shape
    groups = in_features // group_size
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=noise, dtype=torch.uint8)
    if values == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0
    zeros = torch.randint(0, (1 << bits) + 1, (out_features, groups), generator=noise, dtype=torch.int16)
    offsets = normal(noise, out_features, groups)
    return QuantWeight(
        codes,
        (normal(noise, out_features, groups) * 0.02).to(scale),
        zeros if shift == "zeros" else torch.full_like(zeros, 1 << bits - 1) if shift == "one zero" else None,
        group_size,
        bits,
        torch.randperm(in_features, generator=noise) if ordered else None,
        values,
        offsets if shift == "offsets" else offsets.half().float() if shift == "small offsets" else None,
    )


def exact(weight: QuantWeight) -> torch.Tensor:
    return oracle.dequantise(
        weight.codes,
        weight.scales,
        weight.zeros if weight.offsets is None else weight.offsets,
        weight.group_size,
        weight.order,
        values=None if weight.values == "integer" else table(weight.values),
        has_offsets=weight.offsets is not None,
    )


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


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_weight_of_every_kind_is_rounded_once(noise: torch.Generator, kind: Kind) -> None:
    weight = random_weight(noise, (64, 70, 16), *kind, ordered=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(dequantise(weight, dtype), exact(weight).float().to(dtype))


@pytest.mark.parametrize("values", BITS)
def test_codes_stand_for_the_numbers_of_their_kind(values: Values) -> None:
    want = oracle.numbers(values, BITS[values][0])
    if values == "integer":
        with pytest.raises(KeyError):
            table(values)
    else:
        torch.testing.assert_close(table(values).double(), want, rtol=0, atol=1.5e-7, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_product_has_the_bits_of_the_dense_one(noise: torch.Generator, kind: Kind) -> None:
    for shape in SHAPES:
        weight = random_weight(noise, shape, *kind)
        assert fits_kernels(weight)
        packed, dense = pack_quant(weight), pack_linear(dequantise(weight, torch.float32))
        for tokens in TOKENS:
            x, bias = normal(noise, tokens, shape[0]), normal(noise, shape[1])
            for given in (None, bias):
                out = poisoned(tokens, shape[1])
                assert quant_linear(x, packed, given, out=out) is out
                assert_same_bits(out, linear(x, dense, given))
            total = normal(noise, tokens, shape[1])
            want = linear(x, dense, bias, residual=total)
            quant_linear(x, packed, bias, residual=total, out=total)
            assert_same_bits(total, want)
        assert_near(out, oracle.quant_linear(x, exact(weight), bias), times=4)


@pytest.mark.usefixtures("isa")
def test_many_tokens_have_the_bits_of_the_dense_product(noise: torch.Generator) -> None:
    weight = random_weight(noise, (328, 65, 8), 5, torch.bfloat16, "integer", "offsets")
    x = normal(noise, 241, 328)
    dense = pack_linear(dequantise(weight, torch.float32))
    assert_same_bits(quant_linear(x, pack_quant(weight)), linear(x, dense))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [1, 16, 50])
def test_a_gate_has_the_bits_of_one_after_the_dense_product(
    noise: torch.Generator, gate: Gate, inner: int
) -> None:
    weight = random_weight(noise, (96, 2 * inner, 32))
    packed, dense = pack_quant(weight), pack_linear(dequantise(weight, torch.float32))
    for tokens in TOKENS:
        x, bias = normal(noise, tokens, 96), normal(noise, 2 * inner)
        out = poisoned(tokens, inner)
        assert quant_linear(x, packed, bias, gate=gate, out=out) is out
        assert_same_bits(out, linear(x, dense, bias, gate=gate))
    with pytest.raises(ValueError, match="both a gate"):
        quant_linear(x, packed, bias, gate=gate, residual=out)


def test_codes_that_are_nan_fit_no_kernel(noise: torch.Generator) -> None:
    weight = random_weight(noise, (32, 3, 32), 8, torch.float32, "e4m3", "nothing")
    weight.codes[1, 5] = 0xFF
    assert not fits_kernels(weight)
    with pytest.raises(ValueError, match="1 of 96 codes are NaN"):
        pack_quant(weight)


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**110, float("nan")])
def test_scales_at_the_ends_of_float32_fit_no_kernel(noise: torch.Generator, scale: float) -> None:
    weight = random_weight(noise, (32, 3, 32), 4, torch.float32)
    weight.scales[1] = 0
    assert fits_kernels(weight)
    weight.scales[1] = scale
    assert not fits_kernels(weight)
    with pytest.raises(ValueError, match="scales reach from"):
        pack_quant(weight)


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


def test_x_of_another_width_is_refused_with_both_shapes(noise: torch.Generator) -> None:
    packed = pack_quant(random_weight(noise, (96, 4, 32)))
    with pytest.raises(ValueError, match=r"x has shape \[2, 9\]; it needs \[tokens, 96\]"):
        quant_linear(torch.zeros(2, 9), packed)


def test_the_schema_tells_what_is_written(noise: torch.Generator) -> None:
    packed = pack_cpu(random_weight(noise, (96, 40, 32)))
    arguments = (packed.words, packed.scales, packed.shifts, True, 0.0, None, False, 32, None, None, 0)
    torch.library.opcheck(ops.quant_linear, (normal(noise, 3, 96), *arguments, torch.empty(3, 40)))
