"""What a benchmark's runs amount to: percentiles, a table for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tgi_server.bench.load import Run


@dataclass(frozen=True)
class Spread:
    """How measured values lie, in their own unit."""

    mean: float
    lowest: float
    highest: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """values: at least one."""
        ordered = sorted(values)
        p50, p90, p99 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9, 0.99))
        return cls(sum(ordered) / len(ordered), ordered[0], ordered[-1], p50, p90, p99)


@dataclass(frozen=True)
class Case:
    """The figures of one batch size. Times in ms, rates in tokens a second."""

    batch_size: int
    runs: int
    prefill_ms: Spread
    decode_token_ms: Spread | None  # None: answers of one token have no gaps
    whole_ms: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread | None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Case:
        """runs: of one shape, at least one."""
        gaps = [1e3 * gap for run in runs for gap in run.token_s]
        return cls(
            batch_size=runs[0].shape.batch,
            runs=len(runs),
            prefill_ms=Spread.of([1e3 * run.prefill_s for run in runs]),
            decode_token_ms=Spread.of(gaps) if gaps else None,
            whole_ms=Spread.of([1e3 * run.whole_s for run in runs]),
            prefill_tokens_per_s=Spread.of([run.prefill_rate for run in runs]),
            decode_tokens_per_s=Spread.of([run.decode_rate for run in runs]) if gaps else None,
        )


def as_json(cases: Sequence[Case], **about: object) -> dict[str, object]:
    """`about` says what was measured: model, lengths, date."""
    return {**about, "cases": [asdict(case) for case in cases]}


_HEAD = ("step", "batch", "mean", "lowest", "highest", "p50", "p90", "p99", "tokens/s")


def table(cases: Sequence[Case]) -> str:
    """A line for each step and batch size, in Markdown that is also aligned."""
    rows: list[tuple[str, ...]] = [
        _HEAD,
        *(_row("prefill", case, case.prefill_ms, case.prefill_tokens_per_s) for case in cases),
        *(_row("decode, a token", case, case.decode_token_ms, case.decode_tokens_per_s) for case in cases),
        *(_row("whole answer", case, case.whole_ms, None) for case in cases),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [_line(row, widths) for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def _row(step: str, case: Case, times: Spread | None, rate: Spread | None) -> tuple[str, ...]:
    values = (
        ("-",) * 6
        if times is None
        else tuple(
            f"{value:.2f}"
            for value in (times.mean, times.lowest, times.highest, times.p50, times.p90, times.p99)
        )
    )
    return (step, str(case.batch_size), *values, "-" if rate is None else f"{rate.mean:.1f}")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        row[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
    ]
    return "| " + " | ".join(cells) + " |"
