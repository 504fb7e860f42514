from __future__ import annotations

import pytest

from tgi_server.engine.plan import Plan, Sampled, Work
from tgi_server.engine.verify import folded, unrolled


def decoding(name: str, row: int) -> Work:
    return Work(name, 0, row, start=8, count=1, token_ids=[], first_page=0, new_pages=[], samples=True)


GUESSED = Work(
    "g", 0, 1, start=20, count=4, token_ids=[1, 2, 3, 4], first_page=1, new_pages=[7], samples=True, adapter=3,
    top_logprobs=1, guessed=3,
)  # fmt: skip
SCORED = Work("p", 0, 2, 0, 3, [5, 6, 7], 0, [9], samples=False, scored=[6, 7, 8])


def test_a_plan_without_guesses_is_left_as_it_is() -> None:
    plan = Plan([decoding("a", 0), SCORED])
    assert unrolled(plan) is plan
    found = [Sampled([1], [-1.0]), Sampled([], [], prompt_logprobs=[-2.0])]
    assert folded(plan, found) == found


def test_every_guess_is_an_item_of_one_token_at_its_place() -> None:
    parts = unrolled(Plan([decoding("a", 0), GUESSED, SCORED])).work
    assert [(work.id, work.start, work.count, work.token_ids) for work in parts] == [
        ("a", 8, 1, []), ("g", 20, 1, [1]), ("g", 21, 1, [2]), ("g", 22, 1, [3]), ("g", 23, 1, [4]),
        ("p", 0, 3, [5, 6, 7]),
    ]  # fmt: skip
    guessed = parts[1:5]
    assert [work.new_pages for work in guessed] == [[7], [], [], []], "pages come once"
    assert all(work.adapter == 3 and work.top_logprobs == 1 and work.samples for work in guessed)
    assert all(work.guessed == 0 for work in parts)


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [([2, 3, 4, 5], 4), ([2, 3, 9, 5], 3), ([2, 9, 4, 5], 2), ([9, 3, 4, 5], 1), ([9, 2, 3, 4], 1)],
)
def test_tokens_are_kept_to_the_first_that_was_guessed_wrong_with_all_that_belongs_to_them(
    drawn: list[int], kept: int
) -> None:
    plan = Plan([decoding("a", 0), GUESSED, SCORED])
    found = [Sampled([token], [-token / 8], [[(token, 0.0)]]) for token in drawn]
    before, after = Sampled([1], [-1.0]), Sampled([], [], prompt_logprobs=[-2.0])
    expected = Sampled(drawn[:kept], [-t / 8 for t in drawn[:kept]], [[(t, 0.0)] for t in drawn[:kept]])
    assert folded(plan, [before, *found, after]) == [before, expected, after]
