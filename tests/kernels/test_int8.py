"""int8 by int8 on CPUs: the bits of whole-number sums, whatever computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.activation import Gate
from tgi_kernels.int8 import fits_int8, int8_linear, pack_int8
from tgi_kernels.matmul import GATED
from tgi_kernels.quant_size import MAX_INT8_COLUMNS, QuantKind, packed_bytes
from tgi_kernels.quant_weight import QuantWeight
from tgi_kernels.reference import int8 as oracle

TOKENS = [0, 1, 2, 7, 33]
# in_features, out_features
SHAPES = [(1, 1), (3, 33), (5, 31), (31, 64), (96, 100), (130, 33), (576, 65), (1152, 40)]
WAYS = [*cpu.available_isas(), *(["avx512, no VNNI"] if cpu.has_vnni() else [])]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each instruction set of this CPU, and without VNNI if it has that."""
    before, vnni = cpu.isa(), cpu.vnni()
    isa, _, without = str(request.param).partition(", ")
    cpu.set_isa(isa)
    cpu.set_vnni(cpu.has_vnni() and not without)
    yield str(request.param)
    cpu.set_isa(before)
    cpu.set_vnni(vnni)


def random_weight(noise: torch.Generator, in_features: int, out_features: int) -> QuantWeight:
    """Every code there is, scales of 16 bits."""
    codes = torch.randint(0, 256, (out_features, in_features), generator=noise, dtype=torch.uint8)
    scales = (torch.rand(out_features, 1, generator=noise) * 0.02 + 1e-4).bfloat16()
    zeros = torch.full((out_features, 1), 128, dtype=torch.int16)
    return QuantWeight(codes, scales, zeros, in_features, 8, inputs="rows")


def expected(x: Tensor, weight: QuantWeight, bias: Tensor | None = None, fixed: float = 0.0) -> Tensor:
    return oracle.int8_linear(x, weight.codes.short() - 128, weight.scales.squeeze(1), bias, fixed)


@pytest.mark.usefixtures("way")
def test_products_have_the_bits_of_whole_number_sums(noise: torch.Generator) -> None:
    for in_features, out_features in SHAPES:
        weight = random_weight(noise, in_features, out_features)
        packed = pack_int8(weight)
        for tokens in TOKENS:
            x, bias = normal(noise, tokens, in_features) * 3, normal(noise, out_features)
            for given in (None, bias):
                out = poisoned(tokens, out_features)
                assert int8_linear(x, packed, given, out=out) is out
                assert_same_bits(out, expected(x, weight, given))
            total = normal(noise, tokens, out_features)
            want = total + expected(x, weight, bias)
            int8_linear(x, packed, bias, residual=total, out=total)
            assert_same_bits(total, want)


@pytest.mark.usefixtures("way")
def test_the_largest_sums_are_exact() -> None:
    codes = torch.zeros(33, MAX_INT8_COLUMNS, dtype=torch.uint8)
    codes[16:] = 255
    zeros = torch.full((33, 1), 128, dtype=torch.int16)
    step = torch.tensor([1 / 128])
    weight = QuantWeight(
        codes, torch.ones(33, 1), zeros, MAX_INT8_COLUMNS, 8, inputs="rows", input_scale=step
    )
    x = torch.tensor([-1.0, 1.0]).unsqueeze(1).expand(2, MAX_INT8_COLUMNS).contiguous()
    want = torch.tensor([[-128], [127]]) * (codes[:, 0].long() - 128) * MAX_INT8_COLUMNS
    assert_same_bits(int8_linear(x, pack_int8(weight)), want.float() / 128)


@pytest.mark.usefixtures("way")
def test_a_token_has_the_same_bits_alone_and_among_others_on_any_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...]
) -> None:
    weight = random_weight(noise, 700, 200)
    packed = pack_int8(weight)
    x = normal(noise, 500, 700)
    want = expected(x, weight)
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        assert_same_bits(int8_linear(x, packed), want)
        for token in (0, 239, 240, 499):
            assert_same_bits(int8_linear(x[token : token + 1], packed), want[token : token + 1])


@pytest.mark.usefixtures("way")
def test_rounding_is_to_the_nearest_step_ties_to_even_and_cut_at_the_ends() -> None:
    steps = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.49, 300.0, -127.5, -128.5, -300.0, 1e30, 0.0])
    x = (steps * 0.25).unsqueeze(0)
    identity = torch.full((len(steps), len(steps)), 128, dtype=torch.uint8)
    identity.fill_diagonal_(129)
    zeros = torch.full((len(steps), 1), 128, dtype=torch.int16)
    weight = QuantWeight(identity, torch.ones(len(steps), 1), zeros, len(steps), 8, inputs="rows")
    stored = replace(weight, input_scale=torch.tensor([0.25]))
    got = int8_linear(x, pack_int8(stored)) * 4
    assert got.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128, 127, 0]]
    assert int8_linear(torch.zeros(1, len(steps)), pack_int8(weight)).tolist() == [[0.0] * len(steps)]
    tiny = torch.full((1, len(steps)), 1e-44)  # whose scale is no number above zero
    assert int8_linear(tiny, pack_int8(weight)).abs().max() == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fixed", [None, 0.5])
def test_what_is_no_number_stays_in_its_own_token(
    noise: torch.Generator, bad: float, fixed: float | None
) -> None:
    weight = random_weight(noise, 70, 40)
    if fixed is not None:
        weight = replace(weight, input_scale=torch.tensor([fixed]))
    packed = pack_int8(weight)
    x = normal(noise, 20, 70)
    want = int8_linear(x, packed)
    x[13, 69] = bad
    got = int8_linear(x, packed)
    if fixed is None or math.isnan(bad):
        assert not bool(got[13].isfinite().any())
    else:
        assert_same_bits(got[13:14], expected(x[13:14], weight, fixed=fixed))
    rest = torch.arange(20) != 13
    assert_same_bits(got[rest], want[rest])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [1, 16, 50])
def test_a_gate_has_the_bits_of_one_after_the_product(noise: torch.Generator, gate: Gate, inner: int) -> None:
    packed = pack_int8(random_weight(noise, 96, 2 * inner))
    for tokens in TOKENS:
        x, bias = normal(noise, tokens, 96), normal(noise, 2 * inner)
        out = poisoned(tokens, inner)
        assert int8_linear(x, packed, bias, gate=gate, out=out) is out
        assert_same_bits(out, GATED[gate](int8_linear(x, packed, bias)))
    with pytest.raises(ValueError, match="both a gate"):
        int8_linear(x, packed, bias, gate=gate, residual=out)


def test_rows_of_x_may_lie_apart(noise: torch.Generator) -> None:
    packed = pack_int8(random_weight(noise, 97, 40))
    x = normal(noise, 9, 300)[:, 100:197]
    assert_same_bits(int8_linear(x, packed), int8_linear(x.contiguous(), packed))


def test_the_oracle_rounds_to_the_nearest_whole_number_of_steps(noise: torch.Generator) -> None:
    x = normal(noise, 4, 50)
    codes, scales = oracle.quantise_int8(x)
    for row, row_codes, scale in zip(x.tolist(), codes.tolist(), scales.tolist(), strict=True):
        most = max(abs(value) for value in row)
        assert abs(Fraction(scale) - Fraction(most) / Fraction(255, 2)) < Fraction(scale) / 2**23
        for value, code in zip(row, row_codes, strict=True):
            assert -128 <= code <= 127
            off = abs(Fraction(value) / Fraction(scale) - code)
            assert off <= Fraction(1, 2) + Fraction(1, 10**5) or code == 127


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.usefixtures("way")
def test_a_layer_computes_what_compressed_tensors_own_layer_does(
    noise: torch.Generator, stored: bool
) -> None:
    package = pytest.importorskip("compressed_tensors")
    int8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    inputs = int8 | ({"strategy": "tensor"} if stored else {"strategy": "token", "dynamic": True})
    args = package.quantization.QuantizationArgs(**inputs)
    weight = random_weight(noise, 200, 70)
    x = normal(noise, 9, 200) * 2
    if stored:
        weight = replace(weight, input_scale=torch.tensor([0.03]))
        scale, zero = weight.input_scale, torch.zeros(1)
    else:
        utils = package.quantization.utils
        # Its axes are sequences, tokens of each, columns.
        scale, zero = utils.compute_dynamic_scales_and_zp(x.unsqueeze(0), args, torch.nn.Module())
        assert torch.equal(scale.flatten(), oracle.quantise_int8(x)[1])
    rounded = package.quantization.lifecycle.forward.fake_quantize(x.unsqueeze(0), scale, zero, args)[0]
    dense = (weight.codes.double() - 128) * weight.scales.double()
    want = rounded.double() @ dense.T
    got = int8_linear(x, pack_int8(weight)).double()
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()
    unrounded = x.double() @ dense.T
    assert (unrounded - want).abs().max() > 1e-4 * want.abs().max(), "rounding shows"


def test_other_matrices_are_not_taken(noise: torch.Generator) -> None:
    weight = random_weight(noise, 64, 8)
    assert fits_int8(weight)
    shifted = weight.zeros.clone() if weight.zeros is not None else None
    assert shifted is not None
    shifted[3] = 127
    halves = weight.scales.repeat(1, 2), torch.full((8, 2), 128, dtype=torch.int16)
    others = [
        replace(weight, inputs="exact"),
        replace(weight, inputs="other"),
        replace(weight, zeros=shifted),
        replace(weight, scales=halves[0], zeros=halves[1], group_size=32),
        replace(weight, order=torch.arange(64)),
        replace(weight, bits=7, codes=weight.codes & 127),
        random_weight(noise, MAX_INT8_COLUMNS + 1, 1),
    ]
    for other in others:
        assert not fits_int8(other)
    with pytest.raises(
        ValueError, match=r"\[8, 64\] codes of 8 bits, kind integer, .* inputs exact: the kernels"
    ):
        pack_int8(others[0])


def test_x_of_another_width_is_refused_with_both_shapes(noise: torch.Generator) -> None:
    packed = pack_int8(random_weight(noise, 96, 4))
    with pytest.raises(ValueError, match=r"x has shape \[2, 9\]; it needs \[tokens, 96\]"):
        int8_linear(torch.zeros(2, 9), packed)
    with pytest.raises(ValueError, match=r"x has shape \[2, 95\]; it needs \[tokens, 96\]"):
        int8_linear(torch.zeros(2, 95), packed)
    with pytest.raises(ValueError, match="out has shape"):
        int8_linear(torch.zeros(2, 96), packed, out=torch.empty(2, 7))


@pytest.mark.parametrize("shape", [(2, 7), (33, 96), (64, 576), (65, 257)])
def test_a_packed_matrix_has_the_size_that_was_planned(
    noise: torch.Generator, shape: tuple[int, int]
) -> None:
    packed = pack_int8(random_weight(noise, shape[1], shape[0]))
    planned = packed_bytes(QuantKind(8, -1, inputs="rows"), *shape, on_gpu=False)
    assert planned == packed.codes.nbytes + packed.scales.nbytes


def test_vnni_is_refused_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_vnni", lambda: False)
    with pytest.raises(ValueError, match="AVX512-VNNI is not on this CPU"):
        cpu.set_vnni(True)


def test_the_schema_tells_what_is_written(noise: torch.Generator) -> None:
    packed = pack_int8(random_weight(noise, 96, 40))
    arguments = (packed.codes, packed.scales, 0.0, None, None, 0)
    torch.library.opcheck(ops.int8_linear, (normal(noise, 3, 96), *arguments, torch.empty(3, 40)))
