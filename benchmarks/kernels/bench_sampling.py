"""Choosing tokens from logits: greedy and filtered draws, beside torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Report, Roofs, copies_for, main, time_chain, time_isolated
from tgi_kernels.sampling import NUMBERS, WHOLES, Settings, greedy, sample, top_logprobs

VOCAB = 128256
DRAWS: dict[str, dict[str, float]] = {
    "topk_topp": {"top_k": 50, "top_p": 0.9},
    "topp": {"top_p": 0.9},
    "unfiltered": {},
}


def bench(report: Report, roofs: Roofs) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 8, 64, 256):
            _bench_greedy(report, roofs, rows, dtype)
    for name, filters in DRAWS.items():
        for rows in (1, 8, 64, 256):
            _bench_draw(report, roofs, rows, name, filters)
    for rows in (1, 8, 64, 256):
        _bench_top(report, roofs, rows)


def _bench_greedy(report: Report, roofs: Roofs, rows: int, dtype: torch.dtype) -> None:
    logits = _logits(rows).to(dtype)
    ids = torch.empty(rows, dtype=torch.int64, device="cuda")
    logprobs = torch.empty(rows, device="cuda")
    name = "greedy" if dtype == torch.float32 else "greedy bf16"
    _figures(
        report,
        f"{name} B={rows}",
        logits[0].nbytes / roofs.read,
        [lambda one=one: greedy(one, ids, logprobs) for one in logits],
        {
            "torch argmax alone": [lambda one=one: torch.argmax(one, -1) for one in logits],
            "torch with logprob": [lambda one=one: torch.log_softmax(one, -1).max(-1) for one in logits],
        },
    )


def _bench_draw(report: Report, roofs: Roofs, rows: int, name: str, filters: dict[str, float]) -> None:
    logits = _logits(rows)
    settings = Settings.neutral(rows, 8, 1, "cuda")
    settings.numbers[:, NUMBERS.index("temperature")] = 0.8
    settings.wholes[:, WHOLES.index("seed")] = torch.arange(rows, device="cuda")
    for filter_name, value in filters.items():
        table, names = (settings.numbers, NUMBERS) if filter_name in NUMBERS else (settings.wholes, WHOLES)
        table[:, names.index(filter_name)] = value
    at = torch.arange(rows, device="cuda")
    ids, logprobs = torch.empty_like(at), torch.empty(rows, device="cuda")
    _figures(
        report,
        f"{name} B={rows}",
        logits[0].nbytes / roofs.read,
        [lambda one=one: sample(one, at, at, settings, ids=ids, logprobs=logprobs) for one in logits],
        {"torch": [lambda one=one: _torch_draw(one, **filters) for one in logits]},
    )


def _bench_top(report: Report, roofs: Roofs, rows: int, count: int = 5) -> None:
    logits = _logits(rows).bfloat16()
    _figures(
        report,
        f"likeliest {count} bf16 B={rows}",
        logits[0].nbytes / roofs.read,
        [lambda one=one: top_logprobs(one, count) for one in logits],
        {"torch": [lambda one=one: torch.log_softmax(one.float(), -1).topk(count, dim=-1) for one in logits]},
    )


def _torch_draw(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What torch's own operations make of it; the noise is exponential, as multinomial's."""
    scores, order = (logits / 0.8), None
    if top_k:
        scores, order = scores.topk(top_k, dim=-1)
    elif top_p < 1:
        scores, order = scores.sort(dim=-1, descending=True)
    p = scores.softmax(-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    drawn = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return drawn if order is None else order.gather(-1, drawn)


def _logits(rows: int) -> Tensor:
    """Copies of [rows, vocab] as peaked as a language model's: a dozen nats from the bulk to the best."""
    return torch.randn(copies_for(rows * VOCAB * 4), rows, VOCAB, device="cuda") * 3


def _figures(
    report: Report,
    case: str,
    floor_s: float,
    ours: list[Callable[[], object]],
    others: dict[str, list[Callable[[], object]]],
) -> None:
    baselines = {name: time_isolated(theirs).median_s * 1e6 for name, theirs in others.items()}
    roof = floor_s * 1e6
    report.add("sampling", case, time_isolated(ours).median_s * 1e6, roof=roof, baselines=baselines)
    report.add("sampling", case, time_chain(ours).median_s * 1e6, metric="time in a chain", roof=roof)


if __name__ == "__main__":
    main(bench)
