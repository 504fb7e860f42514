"""Attention on the GPU: decode and prefill against a float64 oracle, and the bits that must not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import assert_same_bits, poisoned
from tgi_kernels.attention_cuda import attention_decode, attention_decode_workspace, attention_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PAGE_TOKENS = 16
BOTH_DTYPES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    q: Tensor
    kv_pages: Tensor
    page_table: Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


def make(
    lengths: Sequence[tuple[int, int]],
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    peak: float = 1.0,
) -> Case:
    """lengths: (queries, keys) of each sequence. Pages lie scattered; rows that no sequence filled hold NaN."""
    pages_of = [-(-keys // PAGE_TOKENS) for _, keys in lengths]
    num_pages = sum(pages_of) + 3
    order = torch.randperm(num_pages, device="cuda").to(torch.int32)
    page_table = torch.full((len(lengths), max(1, *pages_of) + 1), -7, dtype=torch.int32, device="cuda")
    kv_pages = torch.randn(num_pages, 2, heads[1], PAGE_TOKENS, head_dim, device="cuda")
    kv_pages[:, 0] *= peak
    taken = 0
    for seq, ((_, keys), pages) in enumerate(zip(lengths, pages_of, strict=True)):
        page_table[seq, :pages] = order[taken : taken + pages]
        taken += pages
        if keys % PAGE_TOKENS:
            kv_pages[page_table[seq, pages - 1], :, :, keys % PAGE_TOKENS :] = float("nan")
    kv_pages[order[taken:].long()] = float("nan")
    queries = [queries for queries, _ in lengths]
    q = torch.randn(sum(queries), heads[0], head_dim, device="cuda").to(dtype)
    return Case(
        q, kv_pages.to(cache or dtype), page_table, tuple(queries), tuple(keys for _, keys in lengths)
    )


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def scale_of(case: Case) -> float:
    return float(case.q.shape[2] ** -0.5)


def decode(case: Case, **options: Any) -> Tensor:
    queries = case.query_lens[0]
    assert set(case.query_lens) == {queries}
    workspace = attention_decode_workspace(
        len(case.kv_lens), case.kv_pages, case.q.shape[1], case.page_table.shape[1], queries_per_seq=queries
    )
    out = poisoned(*case.q.shape, dtype=case.q.dtype, device="cuda")
    options = {"queries_per_seq": queries, "out": out, **options}
    kv_lens = ints(case.kv_lens)
    return attention_decode(
        case.q, case.kv_pages, case.page_table, kv_lens, scale_of(case), workspace, **options
    )


def prefill(case: Case, **options: Any) -> Tensor:
    starts = ints([0, *torch.tensor(case.query_lens).cumsum(0).tolist()])
    options = {"out": poisoned(*case.q.shape, dtype=case.q.dtype, device="cuda"), **options}
    return attention_prefill(
        case.q, case.kv_pages, case.page_table, starts, ints(case.kv_lens), scale_of(case), **options
    )


def eager(
    case: Case,
    dtype: torch.dtype,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """The same by torch's operators, all of `dtype`: in float64 the oracle, else what rounding must be judged by."""
    out = torch.zeros(case.q.shape, dtype=dtype, device="cuda")
    heads, kv_heads = case.q.shape[1], case.kv_pages.shape[2]
    first = 0
    for seq, (queries, keys) in enumerate(zip(case.query_lens, case.kv_lens, strict=True)):
        stop = first + queries
        if keys == 0 or queries == 0:
            first = stop
            continue
        pages = case.page_table[seq, : -(-keys // PAGE_TOKENS)].long()
        rows = case.kv_pages.view(torch.uint8)[pages].view(case.kv_pages.dtype).to(dtype)
        rows = (
            rows.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :keys].repeat_interleave(heads // kv_heads, dim=1)
        )
        scores = (case.q[first:stop].to(dtype).transpose(0, 1) @ rows[0].transpose(1, 2)) * (
            scale_of(case) * k_scale
        )
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (
            torch.arange(keys, device="cuda") - torch.arange(keys - queries, keys, device="cuda")[:, None]
        )
        if alibi_slopes is not None:
            scores = scores + (alibi_slopes.double()[:, None, None] * distance).to(dtype)
        seen = (distance <= 0) & ((distance > -window) if window else True)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, queries, 1)), dim=-1)
        weights = scores.softmax(-1, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(
            dtype
        )
        out[first:stop] = (weights[..., :keys] @ (rows[1] * v_scale)).transpose(0, 1)
        first = stop
    return out


def assert_as_good_as_eager(got: Tensor, case: Case, **options: Any) -> None:
    """The error is at most twice that of the same computation by torch in the same dtype."""
    want = eager(case, torch.float64, **options)
    usual = (eager(case, case.q.dtype, **options).double() - want).abs().max().item()
    error = (got.double() - want).abs().max().item()
    rounding = torch.finfo(got.dtype).eps / 2 * want.abs().max().item()
    assert error <= 2 * usual + rounding, f"the largest error is {error:.3g}; torch's own is {usual:.3g}"


RAGGED = (1, 7, 16, 17, 63, 64, 65, 128, 255, 300, 1000, 1025, 4097, 9000)


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


VARIANTS = [
    {"window": 1},
    {"window": 50},
    {"window": 1000},
    {"softcap": 3.0},
    {"alibi_slopes": True},
    {"sinks": True},
    {"window": 77, "softcap": 5.0, "alibi_slopes": True, "sinks": True},
]


def with_heads(options: dict[str, Any], heads: int) -> dict[str, Any]:
    """True stands for one number a head."""
    slopes, sinks = (
        torch.linspace(0.01, 0.4, heads, device="cuda"),
        torch.linspace(-2, 6, heads, device="cuda"),
    )
    per_head = {"alibi_slopes": slopes, "sinks": sinks}
    return {name: per_head[name] if value is True else value for name, value in options.items()}


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


MIXED = ((1, 1), (1, 500), (17, 17), (64, 64), (65, 129), (128, 4000), (0, 77), (333, 333), (700, 2000))


@pytest.mark.parametrize("dtype", BOTH_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 136, 192, 256])
def test_prefill_agrees_with_the_oracle_for_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    case = make(MIXED, head_dim=head_dim, dtype=dtype)
    assert_as_good_as_eager(prefill(case), case)


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


def only(case: Case, seq: int) -> Case:
    """One sequence of a case as a batch of its own."""
    first = sum(case.query_lens[:seq])
    stop = first + case.query_lens[seq]
    return replace(
        case, q=case.q[first:stop], page_table=case.page_table[seq : seq + 1].contiguous(),
        query_lens=case.query_lens[seq : seq + 1], kv_lens=case.kv_lens[seq : seq + 1],
    )  # fmt: skip


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


@pytest.mark.parametrize("options", [{}, {"window": 100, "sinks": True}], ids=["plain", "window-sinks"])
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
