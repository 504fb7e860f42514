"""Counters and histograms, and Prometheus' text format for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """Counts up, for each value of one label or without any."""

    def __init__(self, name: str, help: str, label: str = "", values: Sequence[str] = ()) -> None:
        """values: those the label is known to take; they are shown at 0 from the start."""
        self._head = _head(name, help, "counter")
        self._name = name
        self._label = label
        self._counts: dict[str, float] = dict.fromkeys(values if label else [""], 0)

    def add(self, amount: float = 1, value: str = "") -> None:
        self._counts[value] = self._counts.get(value, 0) + amount

    def lines(self) -> Iterable[str]:
        yield self._head
        for value, count in self._counts.items():
            labels = f'{{{self._label}="{value}"}}' if self._label else ""
            yield f"{self._name}{labels} {_number(count)}"


class Histogram:
    """How often values fell below each of `bounds`."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._head = _head(name, help, "histogram")
        self._name = name
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self) -> Iterable[str]:
        yield self._head
        total = 0
        for bound, count in zip([*map(_number, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{self._name}_bucket{{le="{bound}"}} {total}'
        yield f"{self._name}_sum {_number(self._sum)}"
        yield f"{self._name}_count {total}"


def gauge(name: str, help: str, value: float) -> Iterable[str]:
    return (_head(name, help, "gauge"), f"{name} {_number(value)}")


def counter(name: str, help: str, value: float | Mapping[str, float], label: str = "") -> Iterable[str]:
    """A counter somebody else keeps; with a label, one number for each of its values."""
    yield _head(name, help, "counter")
    if not isinstance(value, Mapping):
        yield f"{name} {_number(value)}"
        return
    for which, count in value.items():
        yield f'{name}{{{label}="{which}"}} {_number(count)}'


def histogram(
    name: str,
    help: str,
    bounds: Sequence[float],
    of: Mapping[str, tuple[float, Sequence[int]]],
    label: str = "",
) -> Iterable[str]:
    """A histogram somebody else keeps: (sum, how many fell into each bucket) for each value of a label; "" is none.

    There is a bucket for each bound and one above them; none at all if nothing has been counted yet.
    """
    yield _head(name, help, "histogram")
    for value, (total, counts) in of.items():
        pair = f'{label}="{value}"' if value else ""
        labels = f"{{{pair}}}" if pair else ""
        below = 0
        shown = zip([*map(_number, bounds), "+Inf"], counts or [0] * (len(bounds) + 1), strict=True)
        for bound, count in shown:
            below += count
            yield f'{name}_bucket{{{pair}{"," if pair else ""}le="{bound}"}} {below}'
        yield f"{name}_sum{labels} {_number(total)}"
        yield f"{name}_count{labels} {below}"


def linear(last: float, count: int) -> list[float]:
    """Bounds that divide 0 … `last` evenly."""
    return [last * (i + 1) / count for i in range(count)]


def _head(name: str, help: str, kind: str) -> str:
    return f"# HELP {name} {help}\n# TYPE {name} {kind}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
