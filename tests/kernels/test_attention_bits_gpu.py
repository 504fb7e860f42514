"""Bits of attention on the GPU: they depend on a token's own sequence alone, and on nothing that runs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.attention_cases import (
    FP8,
    RAGGED,
    VARIANTS,
    Case,
    bias_of,
    decode,
    make,
    only,
    prefill,
    with_heads,
)
from tests.kernels.compare import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def tokens_of(case: Case) -> Case:
    """Every query of a case of one sequence as the last token of a sequence of its own."""
    queries, keys = case.query_lens[0], case.kv_lens[0]
    return replace(
        case, page_table=case.page_table.expand(queries, -1).contiguous(), query_lens=(1,) * queries,
        kv_lens=tuple(range(keys - queries + 1, keys + 1)),
    )  # fmt: skip


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
def test_a_prompt_has_the_bits_of_its_tokens_decoded_one_by_one(head_dim: int, cache: torch.dtype) -> None:
    query = torch.float16 if cache == torch.float16 else torch.bfloat16
    case = make([(1111, 1111)], heads=(8, 2), head_dim=head_dim, dtype=query, cache=cache)
    assert_same_bits(prefill(case), decode(tokens_of(case)))


@pytest.mark.parametrize("cache", [None, FP8], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (3, 1), (7, 1), (12, 2), (16, 2), (40, 1), (71, 1)])
def test_decode_and_prefill_agree_to_the_bit_for_any_group(
    heads: tuple[int, int], cache: torch.dtype | None
) -> None:
    case = make([(150, 1500)], heads=heads, cache=cache)
    assert_same_bits(prefill(case), decode(tokens_of(case)))


@pytest.mark.parametrize("cache", [None, FP8], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids="-".join)
def test_decode_and_prefill_agree_to_the_bit_with_windows_caps_biases_and_sinks(
    options: dict[str, Any], cache: torch.dtype | None
) -> None:
    case = make([(300, 2500)], cache=cache)
    options = with_heads(options, case.q.shape[1])
    assert_same_bits(prefill(case, **options), decode(tokens_of(case), **options))


@pytest.mark.parametrize("cache", [None, FP8], ids=str)
@pytest.mark.parametrize("by_distance", [False, True])
def test_decode_and_prefill_agree_to_the_bit_with_a_bias(
    by_distance: bool, cache: torch.dtype | None
) -> None:
    case = make([(300, 2500)], cache=cache)
    for of_tokens, others in ((not by_distance, {}), (False, {"alibi_slopes": True, "softcap": 4.0})):
        options = with_heads(others, case.q.shape[1])
        options |= {"bias": bias_of(case, (of_tokens, True), 2500), "bias_by_distance": by_distance}
        assert_same_bits(prefill(case, **options), decode(tokens_of(case), **options))


def test_a_bias_of_zeros_changes_no_bit_where_scores_are_made_anyway() -> None:
    case = make([(300, 2500)])
    zeros, options = torch.zeros(1, 1, 1, device="cuda"), {"softcap": 30.0}
    assert_same_bits(prefill(case, bias=zeros, **options), prefill(case, **options))
    for run in (decode, prefill):
        tokens = tokens_of(case)
        assert_same_bits(run(tokens, bias=zeros, **options), run(tokens, **options))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_decode_and_prefill_agree_to_the_bit_beyond_a_chunk(cache: torch.dtype, head_dim: int) -> None:
    query = torch.float16 if cache == torch.float16 else torch.bfloat16
    for keys in (4100, 16384, 16400, 16900, 33000, 50001):
        case = make([(5, keys)], heads=(4, 1), head_dim=head_dim, dtype=query, cache=cache)
        together = prefill(case)
        assert_same_bits(together, decode(case))
        assert_same_bits(together, decode(tokens_of(case)))
        windowed = {"window": keys - 700}
        assert_same_bits(prefill(case, **windowed), decode(case, **windowed))


def test_peaks_and_far_keys_leave_decode_and_prefill_the_same_bits() -> None:
    for peak in (0.01, 4.0, 30.0):
        case = make([(200, 3000)], peak=peak)
        slopes = {"alibi_slopes": torch.linspace(0.5, 40.0, 8, device="cuda")}
        assert_same_bits(prefill(case), decode(tokens_of(case)))
        assert_same_bits(prefill(case, **slopes), decode(tokens_of(case), **slopes))


@pytest.mark.parametrize("options", [{}, {"window": 900}], ids=["plain", "window"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
def test_a_decoded_row_has_the_same_bits_alone_and_in_any_batch(
    dtype: torch.dtype, head_dim: int, options: dict[str, Any]
) -> None:
    lengths = [(1, keys) for keys in (*RAGGED, 70000)] + [(1, 2000)] * 150
    query = torch.bfloat16 if dtype == FP8 else dtype
    case = make(lengths, heads=(8, 4), head_dim=head_dim, dtype=query, cache=dtype)
    together = decode(case, **options)
    for seq in range(len(RAGGED) + 2):
        assert_same_bits(together[seq : seq + 1], decode(only(case, seq), **options))
    half = replace(
        case, q=case.q[5:20], page_table=case.page_table[5:20].contiguous(), query_lens=case.query_lens[5:20],
        kv_lens=case.kv_lens[5:20],
    )  # fmt: skip
    assert_same_bits(together[5:20], decode(half, **options))


@pytest.mark.parametrize("options", [{}, {"window": 60}], ids=["plain", "window"])
@pytest.mark.parametrize("cache", [None, FP8])
def test_verifying_several_tokens_gives_the_bits_of_one_at_a_time(
    cache: torch.dtype | None, options: dict[str, Any]
) -> None:
    case = make([(6, keys) for keys in (6, 64, 66, 258, 1026, 5000)], cache=cache)
    verified = decode(case, **options).unflatten(0, (-1, 6))
    for back in range(6):
        single = replace(
            case, q=case.q.unflatten(0, (-1, 6))[:, 5 - back].contiguous(), query_lens=(1,) * 6,
            kv_lens=tuple(keys - back for keys in case.kv_lens),
        )  # fmt: skip
        assert_same_bits(verified[:, 5 - back].contiguous(), decode(single, **options))


def permuted(case: Case) -> Case:
    order = torch.randperm(case.kv_pages.shape[0], device="cuda")
    raw = case.kv_pages.view(torch.uint8)
    moved = torch.empty_like(raw)
    moved[order] = raw
    known = case.page_table >= 0
    page_table = torch.where(
        known, order[case.page_table.clamp(min=0).long()].to(torch.int32), case.page_table
    )
    return replace(case, kv_pages=moved.view(case.kv_pages.dtype), page_table=page_table.contiguous())


@pytest.mark.parametrize("run", [decode, prefill])
def test_where_pages_lie_changes_no_bit(run: Any) -> None:
    case = make([(2, keys) for keys in RAGGED[1:]])
    assert_same_bits(run(case), run(permuted(case)))


@pytest.mark.parametrize("run", [decode, prefill])
def test_a_hundred_runs_give_the_same_bits(run: Any) -> None:
    case = make([(1, keys) for keys in (700, 5000, 33000)])
    want = run(case)
    for _ in range(100):
        assert_same_bits(run(case), want)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 100, "sinks": True}, {"anchored": False}],
    ids=["plain", "window-sinks", "faster"],
)
@pytest.mark.parametrize("cut", [1, 37, 128, 250])
def test_a_prompt_has_the_same_bits_however_it_is_cut(cut: int, options: dict[str, Any]) -> None:
    case = make([(611, 1500), (300, 300)])
    options = with_heads(options, case.q.shape[1])
    whole = prefill(case, **options)
    pieces = []
    for done in range(0, 611, cut):
        queries = min(cut, 611 - done)
        piece = replace(
            only(case, 0),
            q=case.q[done : done + queries],
            query_lens=(queries,),
            kv_lens=(1500 - 611 + done + queries,),
        )
        pieces.append(prefill(piece, **options))
        if cut == 1 and done > 40:
            break
    cut_up = torch.cat(pieces)
    assert_same_bits(cut_up, whole[: cut_up.shape[0]])
    assert_same_bits(prefill(only(case, 1), **options), whole[611:])
