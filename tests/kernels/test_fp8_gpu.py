"""Products of float8 by float8: inputs rounded like the reference, sums near float64, bits that no batch changes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.compare import assert_same_bits
from tgi_kernels._library import ops
from tgi_kernels.activation import Gate
from tgi_kernels.fp8 import (
    BLOCK,
    PackedFp8,
    fits_fp8,
    fp8_linear,
    fp8_matmul,
    pack_fp8,
    quantise_e4m3,
    rms_norm_e4m3,
)
from tgi_kernels.norm import rms_norm
from tgi_kernels.quant_size import Inputs, QuantKind, packed_bytes
from tgi_kernels.quant_weight import QuantWeight
from tgi_kernels.reference import fp8 as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

DTYPES = (torch.bfloat16, torch.float16)
# out_features, in_features: of layers, and odd ones; those of whole blocks of rows are multiplied in blocks as well.
SHAPES = [(4096, 4096), (6144, 128), (1024, 272), (256, 14336), (28672, 64), (100, 144), (1, 16), (1000, 640)]
TOKENS = (1, 2, 17, 63, 64, 65, 128, 130, 131, 200, 257, 700)
CASES = [
    (shape, in_blocks)
    for shape in SHAPES
    for in_blocks in (False, True)
    if not in_blocks or shape[0] % (2 * BLOCK) == 0
]
TILES = 5  # of csrc/fp8/gemm.cuh
ROUNDINGS = 1.5  # a result may be so many times as far from float64 as the nearest number of its type is


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def random_weight(out_features: int, in_features: int, *, in_blocks: bool) -> tuple[Tensor, Tensor]:
    """Codes, and scales that differ by a factor of 4."""
    codes = (torch.randn(out_features, in_features, device="cuda") * 100).clamp(-448, 448)
    blocks = -(-in_features // BLOCK)
    shape = (out_features // BLOCK, blocks + -blocks % 4) if in_blocks else (out_features,)
    scales = (0.5 + 1.5 * torch.rand(shape, device="cuda")) * 0.01 * in_features**-0.5
    if in_blocks:
        scales[:, blocks:] = 0
    return codes.to(torch.float8_e4m3fn).view(torch.uint8), scales


def wide_weight(codes: Tensor, scales: Tensor, *, in_blocks: bool) -> Tensor:
    return reference.widen_blocks(codes, scales) if in_blocks else reference.widen_rows(codes, scales)


def wide_x(codes: Tensor, scales: Tensor, *, in_blocks: bool) -> Tensor:
    if in_blocks:
        return reference.widen_blocks(codes, scales, rows=1)
    return reference.widen_rows(codes, scales)


def poisoned(tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, features), torch.nan, dtype=dtype, device="cuda")


def close(out: Tensor, exact: Tensor, roundings: float = ROUNDINGS) -> None:
    rounding = (exact.to(out.dtype).double() - exact).norm()
    assert out.isfinite().all()
    assert (out.double() - exact).norm() <= roundings * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 4096), (5, 272), (300, 14336), (2, 40000), (1, 16), (133, 576)]
)
def test_inputs_are_rounded_bit_for_bit_like_the_reference(
    tokens: int, columns: int, in_blocks: bool, dtype: torch.dtype
) -> None:
    x = random(tokens, columns, dtype=dtype, scale=3)
    x[0, :5] *= 30
    x[-1] = 0
    for fixed, bound in (
        (None, float("inf")),
        (None, 2.5),
        (torch.tensor([0.01], device="cuda"), float("inf")),
    ):
        codes, scales = quantise_e4m3(x, in_blocks=in_blocks, fixed=fixed, bound=bound)
        number = None if fixed is None else float(fixed)
        want = reference.quantise_e4m3(x.cpu(), in_blocks=in_blocks, fixed=number, bound=bound)
        assert torch.equal(codes.cpu(), want[0])
        blocks = want[1].shape[-1]
        assert torch.equal(scales.cpu()[..., :blocks], want[1])
        assert not in_blocks or not scales[:, blocks:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 4096), (5, 272), (133, 8192), (2, 32768), (3, 16)])
def test_a_norm_that_rounds_gives_the_bits_of_a_norm_and_a_rounding(
    tokens: int, columns: int, in_blocks: bool, dtype: torch.dtype
) -> None:
    x, weight = random(tokens, columns + 8, dtype=dtype)[:, :columns], random(columns, dtype=dtype)
    x[0, :5] *= 30
    x[-1] = 0
    for fixed, bound in (
        (None, float("inf")),
        (None, 2.5),
        (torch.tensor([0.01], device="cuda"), float("inf")),
    ):
        packed = PackedFp8(torch.zeros(1, columns, dtype=torch.uint8), torch.ones(1), in_blocks, fixed, bound)
        rows = rms_norm_e4m3(x, weight, 1e-5, packed)
        want = quantise_e4m3(
            rms_norm(x.contiguous(), weight, 1e-5), in_blocks=in_blocks, fixed=fixed, bound=bound
        )
        assert torch.equal(rows.codes, want[0])
        assert torch.equal(rows.scales, want[1])


def test_numbers_that_are_none_stay_so_in_their_own_token() -> None:
    x = random(3, 4096)
    x[1, 7] = torch.nan
    weight, scales = random_weight(256, 4096, in_blocks=False)
    for in_blocks in (False, True):
        weight, scales = random_weight(256, 4096, in_blocks=in_blocks)
        codes, x_scales = quantise_e4m3(x, in_blocks=in_blocks)
        out = fp8_matmul(codes, x_scales, weight, scales, dtype=x.dtype, in_blocks=in_blocks)
        assert out[1].isnan().all()
        assert out[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "in_blocks"), CASES, ids=str)
def test_a_product_is_the_float64_one_rounded_and_the_same_for_any_number_of_tokens(
    shape: tuple[int, int], in_blocks: bool, dtype: torch.dtype
) -> None:
    out_features, in_features = shape
    weight, scales = random_weight(out_features, in_features, in_blocks=in_blocks)
    x = random(max(TOKENS), in_features, dtype=dtype)

    def product(rows: Tensor) -> Tensor:
        codes, x_scales = quantise_e4m3(rows, in_blocks=in_blocks)
        out = poisoned(len(rows), out_features, dtype)
        return fp8_matmul(codes, x_scales, weight, scales, dtype=dtype, in_blocks=in_blocks, out=out)

    codes, x_scales = quantise_e4m3(x, in_blocks=in_blocks)
    wide = wide_x(codes, x_scales, in_blocks=in_blocks)
    all_rows = product(x)
    close(all_rows, wide @ wide_weight(weight, scales, in_blocks=in_blocks).T)
    for tokens in TOKENS:
        assert_same_bits(product(x[:tokens]), all_rows[:tokens])
        assert_same_bits(product(x[-tokens:]), all_rows[-tokens:])


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("in_features", [64, 640, 1216, 4096])
def test_every_tile_gives_the_same_bits(in_features: int, in_blocks: bool) -> None:
    weight, scales = random_weight(1024, in_features, in_blocks=in_blocks)
    for tokens in (1, 16, 17, 130, 700):
        codes, x_scales = quantise_e4m3(random(tokens, in_features), in_blocks=in_blocks)
        wide = wide_x(codes, x_scales, in_blocks=in_blocks)
        for epilogue in (0, 1):
            outs = []
            for tile in range(0 if tokens <= 16 else 1, TILES):  # the first one has room for 16
                outs.append(poisoned(tokens, 1024 >> epilogue, torch.bfloat16))
                ops.fp8_matmul(
                    codes, x_scales, weight, scales, in_blocks, None, None, epilogue, outs[-1], tile=tile
                )
                assert_same_bits(outs[-1], outs[0])
            if epilogue == 0:
                close(outs[0], wide @ wide_weight(weight, scales, in_blocks=in_blocks).T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 65, 200, 513])
@pytest.mark.parametrize(
    ("shape", "in_blocks"),
    [((4096, 512), True), ((4096, 512), False), ((1000, 144), False), ((78, 64), False)],
)
def test_bias_residual_and_gate_round_like_separate_ops(
    shape: tuple[int, int], in_blocks: bool, tokens: int, dtype: torch.dtype
) -> None:
    out_features, in_features = shape
    weight, scales = random_weight(out_features, in_features, in_blocks=in_blocks)
    bias, residual = random(out_features, dtype=dtype), random(tokens, out_features, dtype=dtype)
    codes, x_scales = quantise_e4m3(random(tokens, in_features, dtype=dtype), in_blocks=in_blocks)
    wide = wide_x(codes, x_scales, in_blocks=in_blocks)
    exact = wide @ wide_weight(weight, scales, in_blocks=in_blocks).T

    product = partial(fp8_matmul, codes, x_scales, weight, scales, dtype=dtype, in_blocks=in_blocks)
    plain, biased = product(), product(bias=bias)
    close(biased, exact + bias.double())
    assert torch.equal(product(residual=residual), residual + plain)
    gates: tuple[Gate, ...] = ("silu", "gelu", "gelu_tanh")
    for gate in gates:
        out = poisoned(tokens, out_features // 2, dtype)
        gated = product(bias=bias, gate=gate, out=out).double()
        first, second = biased.double().chunk(2, 1)
        if gate == "silu":
            want = functional.silu(first) * second
        else:
            want = functional.gelu(first, approximate="tanh" if gate == "gelu_tanh" else "none") * second
        close(gated.to(dtype), want)
    assert torch.equal(product(bias=bias, residual=residual, out=residual.clone()), residual + biased)


@pytest.mark.parametrize("inputs", ["rows", "blocks"])
def test_a_layer_is_as_near_to_its_exact_product_as_rounding_inputs_allows(inputs: Inputs) -> None:
    tokens, out_features, in_features = 33, 512, 1024
    groups = in_features // BLOCK if inputs == "blocks" else 1
    codes, scales = random_weight(out_features, in_features, in_blocks=False)
    of_rows = scales.view(-1, BLOCK, 1).amax(1, keepdim=True).expand(-1, BLOCK, groups).reshape(-1, groups)
    weight = QuantWeight(
        codes, of_rows.contiguous(), None, in_features // groups, 8, values="e4m3", inputs=inputs
    )
    assert fits_fp8(weight)
    packed = pack_fp8(weight)
    kind = QuantKind(8, weight.group_size, "e4m3", zeros="none", scale_bytes=4, inputs=inputs)
    planned = packed_bytes(kind, out_features, in_features, on_gpu=True)
    assert packed.codes.nbytes + packed.scales.nbytes == planned
    x = random(tokens, in_features)
    exact = x.double() @ reference.widen_rows(codes, of_rows[:, 0]).T
    error = float((fp8_linear(x, packed).double() - exact).norm() / exact.norm())
    assert 0.01 < error < 0.04  # e4m3 has 3 bits after the point: 2.6 % of a normal distribution


def test_what_the_kernels_do_not_take_is_said_before() -> None:
    weight = QuantWeight(
        torch.zeros(256, 256, dtype=torch.uint8),
        torch.ones(256, 1),
        None,
        256,
        8,
        values="e4m3",
        inputs="rows",
    )
    assert not fits_fp8(weight)
    with pytest.raises(ValueError, match="on cpu"):
        pack_fp8(weight)
    with pytest.raises(ValueError, match="24 columns; a multiple of 16"):
        quantise_e4m3(random(2, 24))
