"""Inputs of attention on the GPU, how its tests call it, and what counts as right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.compare import poisoned
from tgi_kernels.attention_cuda import attention_decode, attention_decode_workspace, attention_prefill

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
    bias: Tensor | None = None,
    bias_by_distance: bool = False,
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
        if bias is not None:
            key_at = torch.arange(keys, device="cuda").expand_as(distance)
            columns = -distance.clamp(max=0) if bias_by_distance else key_at
            columns = columns.clamp(max=bias.shape[2] - 1).expand(heads, -1, -1)
            of_tokens = bias if bias.shape[0] == 1 else bias[first:stop]
            picked = of_tokens.expand(queries, heads, -1).transpose(0, 1).gather(2, columns)
            scores = scores + picked.to(dtype)
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


def bias_of(case: Case, shape: tuple[bool, bool], columns: int) -> Tensor:
    """[tokens or 1, heads or 1, columns], a tenth of it -inf but never the first column, cut from a wider tensor."""
    rows, heads = (size if has else 1 for size, has in zip(case.q.shape[:2], shape, strict=True))
    wide = torch.randn(rows, heads + 1, columns + 5, device="cuda")
    hidden = torch.rand(wide.shape, device="cuda") < 0.1
    hidden[..., 0] = False
    return wide.masked_fill(hidden, float("-inf"))[:, :heads, :columns]


def only(case: Case, seq: int) -> Case:
    """One sequence of a case as a batch of its own."""
    first = sum(case.query_lens[:seq])
    stop = first + case.query_lens[seq]
    return replace(
        case, q=case.q[first:stop], page_table=case.page_table[seq : seq + 1].contiguous(),
        query_lens=case.query_lens[seq : seq + 1], kv_lens=case.kv_lens[seq : seq + 1],
    )  # fmt: skip
