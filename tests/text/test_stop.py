from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgi_server.text.stop import StopMatcher, StopStrings

TEXTS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5)


def cut_at(text: str, stops: list[str], *, keep: bool) -> tuple[str, bool]:
    """The same by looking at the whole text: the stop string complete first, the longest of those."""
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text, False
    end, length = min(ends)
    return text[: end if keep else end + length], True


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[str, bool]:
    text = ""
    for piece in pieces:
        shown, found = matcher.push(piece)
        text += shown
        if found:
            return text, True
    return text + matcher.flush(), False


@given(st.lists(TEXTS, max_size=8), STOPS, st.booleans())
def test_the_cut_is_where_a_search_of_the_whole_text_finds_it(
    pieces: list[str], stops: list[str], keep: bool
) -> None:
    expected = cut_at("".join(pieces), stops, keep=keep)
    assert run(StopMatcher(StopStrings(stops), keep=keep), pieces) == expected


@given(TEXTS, STOPS)
def test_nothing_is_shown_that_a_later_character_could_take_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    shown = ""
    for char in text:
        more, found = matcher.push(char)
        shown += more
        if found:
            break
    assert cut_at(text, stops, keep=False)[0].startswith(shown)


@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_the_start_of_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    shown, found = matcher.push(text)
    held = text[len(shown) :]
    assert found or not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("pieces", [["one END two"], ["one E", "ND two"], ["one ", "E", "N", "D"]])
def test_a_stop_string_is_found_inside_a_piece_and_across_pieces(pieces: list[str]) -> None:
    assert run(StopMatcher(StopStrings(["END"])), pieces) == ("one ", True)


def test_without_stop_strings_every_piece_passes_at_once() -> None:
    assert StopMatcher(StopStrings([])).push("anything") == ("anything", False)


def test_answers_that_share_their_stop_strings_do_not_disturb_each_other() -> None:
    stops = StopStrings(["END"])
    first, second = StopMatcher(stops), StopMatcher(stops)
    assert first.push("one E") == ("one ", False)
    assert second.push("ND two") == ("ND two", False)
    assert first.push("ND") == ("", True)
