"""Stop strings in a stream of text, wherever the borders of its pieces fall."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An automaton over all the stop strings of a request (Aho and Corasick, 1975).

    A character costs the same however many strings there are. It is built once and shared by all answers: for
    the longest strings allowed it takes 10 ms and some megabytes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: none empty."""
        self._next: dict[tuple[int, str], int] = {}
        self._fallback = [0]
        self.depth = [0]  # of each state: how many characters of the text may be the start of a stop string
        self.match = [0]  # of each state: characters of the longest stop string that ends there
        for stop in stops:
            self._add(stop)
        self._link()

    def __bool__(self) -> bool:
        return len(self.depth) > 1

    def step(self, state: int, char: str) -> int:
        """The state after one more character; 0 is the first."""
        while (following := self._next.get((state, char))) is None:
            if state == 0:
                return 0
            state = self._fallback[state]
        return following

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._next.get((state, char))
            if following is None:
                following = self._next[state, char] = len(self.depth)
                self.depth.append(self.depth[state] + 1)
                self.match.append(0)
                self._fallback.append(0)
            state = following
        self.match[state] = len(stop)

    def _link(self) -> None:
        """Give every state the state of its longest proper suffix, shallow states first."""
        edges: dict[int, list[tuple[str, int]]] = {}
        for (state, char), following in self._next.items():
            edges.setdefault(state, []).append((char, following))
        queue = deque(following for _, following in edges.get(0, ()))
        while queue:
            state = queue.popleft()
            if not self.match[state]:
                self.match[state] = self.match[self._fallback[state]]
            for char, following in edges.get(state, ()):
                self._fallback[following] = self.step(self._fallback[state], char)
                queue.append(following)


class StopMatcher:
    """Finds the stop string that is complete first, and holds back text that may be the start of one.

    Of two stop strings that end at the same character the longer counts. The answer does not depend on how the
    text was cut.
    """

    def __init__(self, stops: StopStrings, *, keep: bool = False) -> None:
        """keep: whether the stop string itself belongs to the text."""
        self._stops = stops
        self._keep = keep
        self._state = 0
        self._held = ""
        self._active = bool(stops)

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece; returns (text that may be shown now, whether a stop string was found).

        Once one is found, the text returned is the last.
        """
        if not self._active:
            return piece, False
        step, match = self._stops.step, self._stops.match
        text = self._held + piece
        state = self._state
        for index in range(len(self._held), len(text)):
            state = step(state, text[index])
            if match[state]:
                end = index + 1
                self._held = ""
                return text[: end if self._keep else end - match[state]], True
        self._state = state
        shown = len(text) - self._stops.depth[state]
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """The text held back, when nothing more will come."""
        held, self._held, self._state = self._held, "", 0
        return held
