from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import activation_dtypes, assert_near, assert_same_bits, normal, poisoned
from tgi_kernels import cpu
from tgi_kernels._library import ops
from tgi_kernels.attention import PAGE_TOKENS, attention
from tgi_kernels.reference import attention as oracle


@dataclass(frozen=True)
class Case:
    q: Tensor
    kv_pages: Tensor
    page_table: Tensor
    query_starts: Tensor
    kv_lens: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.kv_pages, self.page_table, self.query_starts, self.kv_lens)


def make(
    noise: torch.Generator,
    lengths: Sequence[tuple[int, int]],
    heads: tuple[int, int] = (9, 3),
    head_dim: int = 64,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """lengths: (queries, keys) of each sequence. Pages lie scattered; rows no sequence filled hold NaN."""
    pages_of = [-(-keys // PAGE_TOKENS) for _, keys in lengths]
    num_pages, kv_heads = sum(pages_of) + 3, heads[1]
    order = torch.randperm(num_pages, generator=noise).to(torch.int32)
    page_table = torch.full((len(lengths), max(pages_of) + 1), -7, dtype=torch.int32)
    kv_pages = poisoned(num_pages, 2, kv_heads, PAGE_TOKENS, head_dim)
    taken = 0
    for seq, ((_, keys), pages) in enumerate(zip(lengths, pages_of, strict=True)):
        page_table[seq, :pages] = order[taken : taken + pages]
        taken += pages
        for page in range(pages):
            rows = min(PAGE_TOKENS, keys - page * PAGE_TOKENS)
            kv_pages[page_table[seq, page], :, :, :rows] = normal(noise, 2, kv_heads, rows, head_dim)
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0).to(torch.int32)
    q = normal(noise, int(starts[-1]), heads[0], head_dim)
    floats, ints = (tensor.to(device, dtype) for tensor in (q, kv_pages)), (page_table, starts)
    kv_lens = torch.tensor([keys for _, keys in lengths], dtype=torch.int32)
    return Case(*floats, *(tensor.to(device) for tensor in (*ints, kv_lens)))


def run(case: Case, **options: Any) -> Tensor:
    out = poisoned(*case.q.shape, dtype=case.q.dtype, device=case.q.device.type)
    return attention(*case.args(), case.q.shape[2] ** -0.5, out=out, **options)


def check(case: Case, times: float = 4, **options: Any) -> None:
    want = oracle.attention(*case.args(), case.q.shape[2] ** -0.5, **options)
    assert_near(run(case, **options), want, times)


PREFILLS = [[(n, n)] for n in (1, 7, 15, 16, 17, 33, 130)]
DECODES = [[(1, 1), (1, 15), (1, 16), (1, 17), (1, 300)]]
MIXED = [[(5, 5), (1, 40), (33, 70), (0, 12), (2, 513), (16, 16)], [(1, 511), (1, 512), (1, 513), (3, 1025)]]


@pytest.mark.parametrize("lengths", [*PREFILLS, *DECODES, *MIXED], ids=str)
def test_prefill_decode_and_mixed_batches_are_the_oracles(
    noise: torch.Generator, device: str, lengths: list[tuple[int, int]]
) -> None:
    for dtype in activation_dtypes(device):
        check(make(noise, lengths, device=device, dtype=dtype))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (12, 4), (71, 1), (40, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_grouping_of_heads_is_the_oracles(
    noise: torch.Generator, device: str, heads: tuple[int, int], head_dim: int
) -> None:
    dtype = activation_dtypes(device)[0]
    check(make(noise, [(7, 30), (1, 17)], heads=heads, head_dim=head_dim, device=device, dtype=dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("head_dim", [1, 4, 7, 24, 33, 40, 72, 80, 96, 112, 192, 256, 576])
def test_every_head_dim_is_the_oracles_on_the_cpu(noise: torch.Generator, head_dim: int) -> None:
    check(make(noise, [(7, 30), (1, 17)], heads=(4, 2), head_dim=head_dim))


@pytest.mark.parametrize("window", [1, 5, 16, 17, 600])
@pytest.mark.parametrize("lengths", [PREFILLS[-1], *DECODES, *MIXED], ids=str)
def test_a_window_hides_what_lies_before_it(
    noise: torch.Generator, device: str, window: int, lengths: list[tuple[int, int]]
) -> None:
    check(make(noise, lengths, device=device, dtype=activation_dtypes(device)[0]), window=window)


@pytest.mark.usefixtures("isa")
def test_pages_before_the_window_may_be_gone(noise: torch.Generator) -> None:
    case = make(noise, [(3, 700)])
    want = run(case, window=20)
    case.page_table[0, : (700 - 3 + 1 - 20) // PAGE_TOKENS] = -1
    assert_same_bits(run(case, window=20), want)


@pytest.mark.parametrize("lengths", [PREFILLS[-1], *DECODES, *MIXED], ids=str)
def test_softcap_slopes_and_sinks_are_the_oracles(
    noise: torch.Generator, device: str, lengths: list[tuple[int, int]]
) -> None:
    case = make(noise, lengths, device=device, dtype=activation_dtypes(device)[0])
    slopes = torch.rand(9, generator=noise).to(device)
    sinks = normal(noise, 9, device=device)
    check(case, softcap=1.5)
    check(case, alibi_slopes=slopes)
    check(case, sinks=sinks)
    check(case, softcap=30.0, alibi_slopes=slopes, sinks=sinks, window=40)


def bias_of(noise: torch.Generator, rows: int, heads: int, columns: int, device: str = "cpu") -> Tensor:
    """[tokens or 1, heads or 1, columns] with a tenth of its numbers -inf, cut from a wider tensor."""
    wide = normal(noise, rows, heads + 1, columns + 5)
    wide[torch.rand(wide.shape, generator=noise) < 0.1] = float("-inf")
    return wide.to(device)[:, :heads, :columns]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("by_distance", [False, True], ids=["by key", "by distance"])
@pytest.mark.parametrize("of_tokens", [False, True], ids=["one row", "a row a token"])
@pytest.mark.parametrize("of_heads", [False, True], ids=["one head", "all heads"])
@pytest.mark.parametrize("lengths", MIXED, ids=str)
def test_a_bias_is_added_to_the_scores(
    noise: torch.Generator, lengths: list[tuple[int, int]], of_heads: bool, of_tokens: bool, by_distance: bool
) -> None:
    case = make(noise, lengths)
    rows, heads = case.q.shape[0] if of_tokens else 1, 9 if of_heads else 1
    for columns in (1, 32, 2000):  # what lies beyond the last column takes the last
        bias = bias_of(noise, rows, heads, columns)
        check(case, bias=bias, bias_by_distance=by_distance)
    slopes, sinks = torch.rand(9, generator=noise), normal(noise, 9)
    options = {"softcap": 2.0, "alibi_slopes": slopes, "sinks": sinks, "window": 40}
    check(case, bias=bias, bias_by_distance=by_distance, **options)


def test_a_bias_is_added_on_every_device(noise: torch.Generator, device: str) -> None:
    case = make(noise, MIXED[0], device=device, dtype=activation_dtypes(device)[0])
    for rows, by_distance in ((1, True), (1, False), (case.q.shape[0], False)):
        check(case, bias=bias_of(noise, rows, 9, 600, device), bias_by_distance=by_distance)


@pytest.mark.usefixtures("isa")
def test_the_slopes_of_distance_are_the_bias_they_stand_for(noise: torch.Generator) -> None:
    case, slopes = make(noise, MIXED[0]), torch.linspace(0.1, 0.9, 9)
    by_distance = (slopes[:, None] * -torch.arange(600.0))[None]
    want = run(case, alibi_slopes=slopes)
    torch.testing.assert_close(run(case, bias=by_distance, bias_by_distance=True), want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("isa")
def test_a_bias_may_hide_all_keys_of_a_step_or_of_a_query(noise: torch.Generator) -> None:
    case = make(noise, [(3, 1200), (1, 700)])
    bias = torch.zeros(4, 1, 1200)
    bias[0, 0, :1100] = float("-inf")  # whole steps and splits, then some keys
    bias[1, 0, 1000:] = float("-inf")  # the last ones
    bias[3, 0] = float("-inf")
    out = run(case, bias=bias)
    assert_near(out, oracle.attention(*case.args(), case.q.shape[2] ** -0.5, bias=bias), 4)
    assert out[3].count_nonzero() == 0


def test_a_bias_leaves_a_prompt_in_chunks_its_bits(noise: torch.Generator, device: str) -> None:
    whole = make(noise, [(600, 600)], device=device, dtype=activation_dtypes(device)[0])
    bias = bias_of(noise, 600, 9, 600, device)
    want, parts = run(whole, bias=bias), []
    for start, stop in ((0, 1), (1, 18), (18, 530), (530, 600)):
        lens, starts = (
            torch.tensor(values, dtype=torch.int32, device=device) for values in ([stop], [0, stop - start])
        )
        part = replace(whole, q=whole.q[start:stop], query_starts=starts, kv_lens=lens)
        parts.append(run(part, bias=bias[start:stop]))
    assert_same_bits(torch.cat(parts), want)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(2, 9, 20), "bias has 2 tokens; it needs 5, or 1 for all"),
        (torch.zeros(5, 3, 20), "bias has 3 heads; it needs 9, or 1 for all"),
        (torch.zeros(9, 20), r"bias has shape \[9, 20\]; it needs \[tokens or 1, heads or 1, columns\]"),
        (torch.zeros(1, 9, 20).bfloat16(), "bias has dtype torch.bfloat16; it needs torch.float32"),
        (torch.zeros(1, 20, 9).transpose(1, 2), "bias has 20 columns of stride 9; it needs contiguous ones"),
        (torch.zeros(1, 9, 0), "bias has 0 columns"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_with_its_numbers(
    noise: torch.Generator, bias: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make(noise, [(5, 20)]), bias=bias)


def test_distances_without_a_bias_are_refused(noise: torch.Generator) -> None:
    with pytest.raises(ValueError, match="bias_by_distance without a bias"):
        run(make(noise, [(5, 20)]), bias_by_distance=True)


OPTIONS: list[dict[str, Any]] = [{}, {"window": 20}, {"softcap": 5.0, "window": 600}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_a_prompt_in_chunks_has_the_bits_of_a_prompt_at_once(
    noise: torch.Generator, device: str, options: dict[str, Any], chunk: int
) -> None:
    tokens = 600 if chunk > 1 else 530
    whole = make(noise, [(tokens, tokens)], device=device, dtype=activation_dtypes(device)[0])
    want = run(whole, **options)
    parts = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        lens = torch.tensor([stop], dtype=torch.int32, device=device)
        starts = torch.tensor([0, stop - start], dtype=torch.int32, device=device)
        parts.append(run(replace(whole, q=whole.q[start:stop], query_starts=starts, kv_lens=lens), **options))
    assert_same_bits(torch.cat(parts), want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(
    noise: torch.Generator, device: str, options: dict[str, Any]
) -> None:
    lengths = [(5, 5), (1, 40), (33, 700), (1, 1100), (16, 16), *[(1, 60)] * 20]
    case = make(noise, lengths, device=device, dtype=activation_dtypes(device)[0])
    together = run(case, **options)
    for seq, (queries, _) in enumerate(lengths):
        start = int(case.query_starts[seq])
        alone = Case(
            case.q[start : start + queries],
            case.kv_pages,
            case.page_table[seq : seq + 1],
            torch.tensor([0, queries], dtype=torch.int32, device=device),
            case.kv_lens[seq : seq + 1],
        )
        assert_same_bits(run(alone, **options), together[start : start + queries])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "lengths", [[(1, 1100)], [(1, 2049), (3, 40)], [(40, 600)], [(1, 1000)] * 30], ids=str
)
def test_attention_does_not_depend_on_the_number_of_threads(
    noise: torch.Generator, thread_counts: tuple[int, ...], lengths: list[tuple[int, int]]
) -> None:
    case = make(noise, lengths)
    results = []
    for threads in thread_counts:
        cpu.set_num_threads(threads)
        results.append(run(case))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_queries_may_lie_apart(noise: torch.Generator, device: str) -> None:
    case = make(noise, MIXED[0], device=device, dtype=activation_dtypes(device)[0])
    wide = torch.cat([case.q, case.q], dim=1)
    assert_same_bits(run(replace(case, q=wide[:, :9])), run(case))


def test_large_scores_do_not_overflow(noise: torch.Generator, device: str) -> None:
    case = make(noise, [(20, 40)], device=device, dtype=activation_dtypes(device)[0])
    check(replace(case, q=case.q * 100), times=64)  # a score of 300 has an error of 3e-5 in float32


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kv_lens", 200, "sequence 0 has 200 keys; its 3 pages hold 48"),
        ("kv_lens", 2, "sequence 0 has 5 queries and 2 keys"),
        ("page_table", 99, r"page_table\[0\]\[0\] is 99; kv_pages has 0 to 4"),
        ("page_table", -1, r"page_table\[0\]\[0\] is -1; kv_pages has 0 to 4"),
    ],
)
def test_lengths_and_pages_out_of_range_are_refused_with_the_numbers(
    noise: torch.Generator, field: str, value: int, message: str
) -> None:
    case = make(noise, [(5, 20)])
    getattr(case, field).view(-1)[0] = value
    with pytest.raises(RuntimeError, match=message):
        run(case)


def test_heads_that_no_kv_head_divides_are_refused(noise: torch.Generator) -> None:
    case = make(noise, [(5, 20)])
    with pytest.raises(
        ValueError, match="q has 8 heads and kv_pages 3; the first is a multiple of the second"
    ):
        run(replace(case, q=case.q[:, :8].contiguous()))


def test_the_schema_of_attention_tells_what_is_written(noise: torch.Generator) -> None:
    case = make(noise, [(5, 16)])
    args = (*case.args()[:1], case.kv_pages.nan_to_num(), *case.args()[2:])
    torch.library.opcheck(ops.attention, (*args, 0.125, 0, 0.0, None, None, torch.empty_like(case.q)))
