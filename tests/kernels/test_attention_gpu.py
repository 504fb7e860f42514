"""Attention on the GPU: decode and prefill against a float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.attention_cases import (
    BOTH_DTYPES,
    FP8,
    PAGE_TOKENS,
    RAGGED,
    VARIANTS,
    assert_as_good_as_eager,
    bias_of,
    decode,
    ints,
    make,
    prefill,
    scale_of,
    with_heads,
)
from tests.kernels.compare import assert_same_bits, poisoned
from tgi_kernels.attention_cuda import attention_decode, attention_decode_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 136, 192, 256])
def test_decode_agrees_with_the_oracle_for_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    case = make([(1, keys) for keys in RAGGED], head_dim=head_dim, dtype=dtype)
    assert_as_good_as_eager(decode(case), case)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (16, 2), (24, 2), (40, 1), (71, 1)])
@pytest.mark.parametrize("queries", [1, 2, 3, 8])
def test_decode_packs_any_group_and_any_number_of_queries(heads: tuple[int, int], queries: int) -> None:
    case = make([(queries, keys) for keys in (8, 17, 66, 200, 1030, 4100)], heads=heads)
    assert_as_good_as_eager(decode(case), case)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_decode_reads_a_float8_cache(head_dim: int, queries: int, dtype: torch.dtype) -> None:
    case = make(
        [(queries, keys) for keys in (9, 64, 333, 1500, 5000)], head_dim=head_dim, dtype=dtype, cache=FP8
    )
    scales = {"k_scale": 0.5, "v_scale": 3.0}
    assert_as_good_as_eager(decode(case, **scales), case, **scales)


@pytest.mark.parametrize("power", [-20, 13])
def test_a_float8_cache_takes_queries_beyond_float16(power: int) -> None:
    case = make([(1, keys) for keys in (100, 2000)], cache=FP8)
    case = replace(case, q=case.q * 2.0**power)
    scales = {"k_scale": 2.0**-power}
    assert_as_good_as_eager(decode(case, **scales), case, **scales)
    assert_as_good_as_eager(prefill(case, **scales), case, **scales)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("cache", [None, FP8])
@pytest.mark.parametrize("options", VARIANTS, ids="-".join)
def test_decode_knows_windows_caps_biases_and_sinks(
    options: dict[str, Any], cache: torch.dtype | None, queries: int
) -> None:
    case = make([(queries, keys) for keys in (5, 64, 130, 1100, 6000)], cache=cache)
    options = with_heads(options, case.q.shape[1])
    assert_as_good_as_eager(decode(case, **options), case, **options)


@pytest.mark.parametrize("cache", [None, FP8])
@pytest.mark.parametrize("options", VARIANTS, ids="-".join)
def test_prefill_knows_windows_caps_biases_and_sinks(
    options: dict[str, Any], cache: torch.dtype | None
) -> None:
    case = make([(5, 5), (64, 64), (1, 130), (300, 1100)], cache=cache)
    options = with_heads(options, case.q.shape[1])
    assert_as_good_as_eager(prefill(case, **options), case, **options)


BIASES = [((True, True), False), ((False, True), True), ((False, True), False), ((True, False), False)]


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("cache", [None, FP8], ids=str)
@pytest.mark.parametrize(("shape", "by_distance"), BIASES, ids=str)
def test_a_bias_is_added_to_the_scores(
    shape: tuple[bool, bool], by_distance: bool, cache: torch.dtype | None, head_dim: int
) -> None:
    head_dim = 48 if cache is FP8 and head_dim == 40 else head_dim
    options: dict[str, Any]
    for queries, columns in ((1, 6000), (3, 128), (9, 1)):
        case = make([(queries, keys) for keys in (9, 64, 130, 1100, 6000)], head_dim=head_dim, cache=cache)
        options = {"bias": bias_of(case, shape, columns), "bias_by_distance": by_distance}
        assert_as_good_as_eager(decode(case, **options), case, **options)
    case = make([(5, 5), (64, 64), (1, 130), (300, 1100)], head_dim=head_dim, cache=cache)
    options = {"bias": bias_of(case, shape, 1000), "bias_by_distance": by_distance}
    assert_as_good_as_eager(prefill(case, **options), case, **options)
    more = {"window": 77, "softcap": 5.0, "alibi_slopes": True, "sinks": True}
    options |= with_heads(more, case.q.shape[1])
    assert_as_good_as_eager(prefill(case, **options), case, **options)


def test_a_query_whose_keys_a_bias_hides_becomes_zero_and_disturbs_nobody() -> None:
    case = make([(2, 900), (2, 3000)])
    bias = torch.zeros(4, 1, 3000, device="cuda")
    others = bias.clone()
    bias[1] = float("-inf")
    bias[2, 0, :2500] = float("-inf")
    for run in (decode, prefill):
        out = run(case, bias=bias)
        assert out[1].count_nonzero() == 0
        assert_same_bits(out[[0, 3]], run(case, bias=others)[[0, 3]])
        assert torch.isfinite(out[2]).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 20), r"bias has shape \[2, 8, 20\]; it needs \[1 or 1, 8 or 1, at least 1\]"),
        ((1, 8, 0), r"bias has shape \[1, 8, 0\]"),
        ((1, 8), "bias has 2 dimensions; it needs 3"),
    ],
)
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        decode(make([(1, 100)]), bias=torch.zeros(shape, device="cuda"))


MIXED = ((1, 1), (1, 500), (17, 17), (64, 64), (65, 129), (128, 4000), (0, 77), (333, 333), (700, 2000))


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 136, 192, 256])
def test_prefill_agrees_with_the_oracle_for_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    case = make(MIXED, head_dim=head_dim, dtype=dtype)
    assert_as_good_as_eager(prefill(case), case)


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_prefill_in_the_faster_order_agrees_with_the_oracle(head_dim: int, dtype: torch.dtype) -> None:
    case = make(MIXED, head_dim=head_dim, dtype=dtype)
    assert_as_good_as_eager(prefill(case, anchored=False), case)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", BOTH_DTYPES)
def test_prefill_reads_a_float8_cache(head_dim: int, dtype: torch.dtype) -> None:
    case = make(MIXED, head_dim=head_dim, dtype=dtype, cache=FP8)
    scales = {"k_scale": 0.5, "v_scale": 3.0}
    assert_as_good_as_eager(prefill(case, **scales), case, **scales)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (7, 1), (40, 1), (71, 1)])
def test_prefill_packs_any_group(heads: tuple[int, int]) -> None:
    case = make(MIXED, heads=heads)
    assert_as_good_as_eager(prefill(case), case)


@pytest.mark.parametrize("run", [decode, prefill])
def test_peaked_scores_stay_exact(run: Any) -> None:
    case = make([(1, keys) for keys in (40, 1000, 3000)], peak=8.0)
    assert_as_good_as_eager(run(case), case)


def test_queries_may_be_a_view_of_a_wider_buffer() -> None:
    case = make([(1, keys) for keys in (90, 3000)])
    wide = torch.cat((case.q, case.q.new_full((2, 5, 128), float("nan"))), dim=1)
    view = replace(case, q=wide[:, :8])
    out = poisoned(2, 8, 128, dtype=case.q.dtype, device="cuda")
    assert_same_bits(decode(view, out=out), decode(case))
    assert_same_bits(prefill(view, out=out.clone()), prefill(case))


def test_a_sequence_without_keys_becomes_zeros_and_disturbs_nobody() -> None:
    case = make([(1, 0), (1, 100), (1, 0), (1, 3000), (1, 0)])
    out = decode(case)
    assert out[[0, 2, 4]].count_nonzero() == 0
    assert_as_good_as_eager(out, case)


def test_one_key_among_131072_is_found() -> None:
    case = make([(1, 131072), (1, 131000)], heads=(4, 1))
    for seq, at in ((0, 1234), (1, 130321)):
        page = case.page_table[seq, at // PAGE_TOKENS]
        case.kv_pages[page, 0, 0, at % PAGE_TOKENS] = case.q[seq, 0] * 2
    assert_as_good_as_eager(decode(case), case)
    assert_as_good_as_eager(prefill(case), case)


def test_offsets_reach_beyond_two_to_the_31_elements() -> None:
    case = make([(4, 500), (4, 1200)], heads=(32, 8))
    far = 2**31 // (2 * 8 * PAGE_TOKENS * 128) + 5
    pool = torch.empty(
        far + case.kv_pages.shape[0], *case.kv_pages.shape[1:], dtype=case.q.dtype, device="cuda"
    )
    pool[far:] = case.kv_pages
    moved = replace(
        case, kv_pages=pool, page_table=torch.where(case.page_table >= 0, case.page_table + far, -7)
    )
    assert_same_bits(decode(moved), decode(case))
    assert_same_bits(prefill(moved), prefill(case))


def test_a_graph_follows_lengths_that_change_between_replays() -> None:
    long, short = make([(1, 9000), (1, 5000), (1, 64)]), (100, 65, 2000)
    long = replace(long, page_table=long.page_table.clamp(min=0))
    long.kv_pages.nan_to_num_()
    workspace = attention_decode_workspace(3, long.kv_pages, 8, long.page_table.shape[1])
    kv_lens, out = ints(long.kv_lens), torch.empty_like(long.q)
    args = (long.q, long.kv_pages, long.page_table, kv_lens, scale_of(long), workspace)
    attention_decode(*args, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_decode(*args, out=out)
    for lengths in (short, long.kv_lens, short):
        kv_lens.copy_(ints(lengths))
        out.fill_(float("nan"))
        graph.replay()
        assert_same_bits(out, decode(replace(long, kv_lens=lengths)))


def test_one_workspace_serves_calls_of_every_size_that_fits() -> None:
    large, small = make([(1, 3000)] * 40, heads=(8, 8)), make([(1, 20000), (1, 700)], heads=(8, 8))
    workspace = attention_decode_workspace(40, large.kv_pages, 8, 4096)
    for case in (large, small, large, small, large):
        args = (case.q, case.kv_pages, case.page_table, ints(case.kv_lens), scale_of(case), workspace)
        assert_same_bits(attention_decode(*args), decode(case))


def test_arguments_that_do_not_fit_are_refused_with_their_numbers() -> None:
    case = make([(1, 100)])
    workspace = attention_decode_workspace(1, case.kv_pages, 8, case.page_table.shape[1])
    args = (case.q, case.kv_pages, case.page_table, ints(case.kv_lens), scale_of(case))
    with pytest.raises(RuntimeError, match=r"workspace has 64 bytes"):
        attention_decode(*args, workspace[:64])
    with pytest.raises(RuntimeError, match=r"q has 1 tokens; 1 sequences of 2"):
        attention_decode(*args, workspace, queries_per_seq=2)
    with pytest.raises(RuntimeError, match=r"kv_pages has dtype"):
        attention_decode(case.q, case.kv_pages.half(), *args[2:], workspace)
