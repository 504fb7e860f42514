"""The table of faults says which tests try them; it must not promise what nobody tries."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = (HERE.parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
# The features of the other rows are tried elsewhere or still to come.
PROMISED = {
    *range(1, 27), *range(28, 56), *range(71, 78), *range(79, 86), *range(87, 90), *range(91, 98), *range(100, 109),
    *range(112, 115),
}  # fmt: skip


def test_every_test_the_table_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)
    assert named
    for file, function in named:
        assert f"def {function}(" in (HERE / file).read_text(encoding="utf-8"), f"{file}::{function}"


def test_every_promised_row_is_in_the_table_once() -> None:
    found: list[int] = []
    for first, last in re.findall(r"^\| (\d+)(?:–(\d+))? \|", TABLE, re.MULTILINE):
        found += range(int(first), int(last or first) + 1)
    assert len(found) == len(set(found))
    assert set(found) >= PROMISED
