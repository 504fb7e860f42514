"""Products with weights of every kind on a GPU: exact weights, near to float64, the same bits for any few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import assert_same_bits
from tests.kernels.test_quant import Kind, exact, random_weight
from tests.kernels.test_quant_runs import KINDS
from tgi_kernels._library import ops
from tgi_kernels.quant_runs import PackedRuns, dequantise_runs, pack_runs, runs_matmul
from tgi_kernels.quant_segments import Segments, dequantise_segments
from tgi_kernels.quant_size import MAX_COLUMNS
from tgi_kernels.quant_weight import QuantWeight, Values, dequantise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

DTYPES = [torch.float16, torch.bfloat16]
MOST = 70  # tokens, no whole number of slabs
TOKENS = (1, 7, 8, 9, 16, 17, 40, 64)
# in_features, out_features, group size
SHAPES = [(64, 5, 64), (96, 70, 16), (320, 130, 32), (768, 300, 64), (8192, 64, 128)]
# Of each run its bits, columns and group size.
MIXES = [
    ((5, 384, 128), (4, 3328, 128), (3, 384, 128)),
    ((8, 96, 32), (6, 160, 32), (2, 320, 64)),
    ((4, 32, 32), (3, 64, 32)),
]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def on_gpu(weight: QuantWeight | Segments, dtype: torch.dtype) -> PackedRuns:
    return pack_runs(weight.to(torch.device("cuda")), dtype)


def segments(noise: torch.Generator, mix: tuple[tuple[int, int, int], ...], rows: int) -> Segments:
    return Segments(
        tuple(
            random_weight(noise, (columns, rows, size), bits, shift="one zero") for bits, columns, size in mix
        )
    )


def check(packed: PackedRuns, dense: Tensor, exactly: Tensor) -> None:
    """dense: the weight in the activations' type; exactly: in float64. Both on the CPU."""
    assert torch.equal(dequantise_runs(packed).cpu(), dense)
    dtype = packed.dtype
    x = random(MOST, packed.in_features, dtype=dtype)
    want = x.double() @ exactly.cuda().T
    theirs = torch.nn.functional.linear(x, dense.cuda())
    ours = runs_matmul(x, packed)
    assert (ours.double() - want).norm() <= 1.5 * (theirs.double() - want).norm()
    for tokens in TOKENS:
        out = torch.full((tokens, packed.out_features), torch.nan, dtype=dtype, device="cuda")
        assert runs_matmul(x[:tokens], packed, out=out) is out
        assert_same_bits(out, ours[:tokens])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_product_is_nearer_to_float64_than_that_of_the_rounded_matrix(
    noise: torch.Generator, kind: Kind, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        weight = random_weight(noise, shape, *kind)
        check(on_gpu(weight, dtype), dequantise(weight, dtype), exact(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_runs_of_columns_are_summed_in_fp32(
    noise: torch.Generator, mix: tuple[tuple[int, int, int], ...], dtype: torch.dtype
) -> None:
    for rows in (70, 1100):
        matrix = segments(noise, mix, rows)
        exactly = torch.cat([exact(part) for part in matrix.parts], 1)
        check(on_gpu(matrix, dtype), dequantise_segments(matrix, dtype), exactly)


@pytest.mark.parametrize("values", ["nf4", "e4m3"])
@pytest.mark.parametrize("tokens", [1, 16, 50, 100])
def test_bias_and_residual_are_rounded_as_separate_ops(
    noise: torch.Generator, tokens: int, values: Values
) -> None:
    bits = 4 if values == "nf4" else 8
    weight = random_weight(noise, (576, 200, 64), bits, torch.float32, values, "nothing")
    packed = on_gpu(weight, torch.bfloat16)
    x, bias = random(tokens, 576, dtype=torch.bfloat16), random(200, dtype=torch.bfloat16)
    residual = random(tokens, 200, dtype=torch.bfloat16)
    with_bias = runs_matmul(x, packed, bias)
    total = residual.clone()
    assert runs_matmul(x, packed, bias, residual=total, out=total) is total
    assert_same_bits(total, residual + with_bias)
    torch.testing.assert_close(with_bias, runs_matmul(x, packed) + bias, rtol=0.02, atol=0.05)


def cut(packed: PackedRuns, x: Tensor, ranges: int, least_ctas: int) -> Tensor:
    out = torch.full((len(x), packed.out_features), torch.nan, dtype=x.dtype, device="cuda")
    fields = packed.words, packed.scales, packed.runs, packed.scaling, packed.table, packed.table_scale
    ops.quant_matmul_runs(x, *fields, None, None, out, ranges=ranges, least_ctas=least_ctas)
    return out


@pytest.mark.parametrize("kind", ["nf4", "runs"])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_ranges_may_be_warps_or_ctas_and_their_number_changes_nothing_but_roundings(
    noise: torch.Generator, tokens: int, kind: str
) -> None:
    matrix: QuantWeight | Segments
    if kind == "nf4":
        matrix = random_weight(noise, (4096, 300, 64), 4, torch.float32, "nf4", "nothing")
        exactly = exact(matrix)
    else:
        matrix = segments(noise, MIXES[0], 300)
        exactly = torch.cat([exact(part) for part in matrix.parts], 1)
    packed = on_gpu(matrix, torch.bfloat16)
    x = random(tokens, 4096, dtype=torch.bfloat16)
    want = x.double() @ exactly.cuda().T
    for ranges in (1, 2, 3, 4, 6, 8):
        ours = cut(packed, x, ranges, 1)
        assert (ours.double() - want).norm() <= 1.2 * (want.bfloat16().double() - want).norm()
        for least_ctas in (2, 3, 8):
            assert_same_bits(cut(packed, x, ranges, least_ctas), ours)


def test_more_ranges_than_blocks_of_columns_are_refused(noise: torch.Generator) -> None:
    packed = on_gpu(random_weight(noise, (256, 64, 64), 3), torch.bfloat16)
    with pytest.raises(RuntimeError, match="3 ranges of 2 blocks"):
        cut(packed, random(1, 256, dtype=torch.bfloat16), 3, 0)


def test_columns_in_another_order_meet_their_own_x(noise: torch.Generator) -> None:
    parts = segments(noise, MIXES[1], 130).parts
    order = torch.randperm(576, generator=noise)
    matrix = Segments(parts, order)
    packed = on_gpu(matrix, torch.bfloat16)
    for tokens in (1, 40, 200):
        x = random(tokens, 576, dtype=torch.bfloat16)
        want = x.double().cpu() @ dequantise_segments(matrix, torch.float32).double().T
        far = (runs_matmul(x, packed).double().cpu() - want).norm() / want.norm()
        assert far < 0.01


def test_rows_of_x_and_out_may_lie_apart_and_a_nan_stays_in_its_row(noise: torch.Generator) -> None:
    packed = on_gpu(random_weight(noise, (576, 192, 64), 3), torch.bfloat16)
    x = random(30, 1024, dtype=torch.bfloat16)[:, 64:640]
    x[20, 5] = torch.nan
    wide = torch.full((30, 400), torch.nan, dtype=torch.bfloat16, device="cuda")
    runs_matmul(x, packed, out=wide[:, 100:292])
    assert_same_bits(wide[:, 100:292], runs_matmul(x.contiguous(), packed))
    assert wide[:, 100:292].isnan().any(dim=1).nonzero().flatten().tolist() == [20]
    assert wide[:, :100].isnan().all() and wide[:, 292:].isnan().all()


def test_rows_that_the_copy_engine_cannot_take_are_multiplied_all_the_same(noise: torch.Generator) -> None:
    weight = random_weight(noise, (75, 64, 75), 5)
    packed, x = on_gpu(weight, torch.bfloat16), random(9, 75, dtype=torch.bfloat16)
    want = x.double().cpu() @ exact(weight).T
    torch.testing.assert_close(runs_matmul(x, packed).double().cpu(), want, rtol=0.01, atol=0.02)


def test_the_widest_matrix_is_multiplied(noise: torch.Generator) -> None:
    weight = random_weight(noise, (MAX_COLUMNS, 16, 128), 4, torch.float32, "nf4", "nothing")
    packed, x = on_gpu(weight, torch.bfloat16), random(16, MAX_COLUMNS, dtype=torch.bfloat16)
    want = x.double().cpu() @ exact(weight).T
    assert (runs_matmul(x, packed).double().cpu() - want).norm() < 0.01 * want.norm()


def test_a_product_is_captured_in_a_graph(noise: torch.Generator) -> None:
    packed = on_gpu(segments(noise, MIXES[0], 256), torch.bfloat16)
    x = random(20, 4096, dtype=torch.bfloat16)
    want, out = runs_matmul(x, packed), torch.empty(20, 256, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            runs_matmul(x, packed, out=out)
    graph.replay()
    assert_same_bits(out, want)
