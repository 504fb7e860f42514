"""Stop strings in a stream of text, wherever the borders of its pieces fall."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Finds the stop string that is complete first, and holds back text that may be the start of one.

    An automaton over all the strings (Aho and Corasick, 1975): a character costs the same however many
    there are, and the depth of its state is how much text must be held back. Of two stop strings that end
    at the same character the longer counts. The answer does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        """stops: none empty. keep: whether the stop string itself belongs to the text."""
        self._keep = keep
        self._next: dict[tuple[int, str], int] = {}
        self._depth = [0]
        self._match = [0]  # characters of the longest stop string that ends in this state
        self._fallback = [0]
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0
        self._held = ""
        self._active = bool(stops)

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece; returns (text that may be shown now, whether a stop string was found).

        Once one is found, the text returned is the last.
        """
        if not self._active:
            return piece, False
        text = self._held + piece
        state = self._state
        for index in range(len(self._held), len(text)):
            state = self._step(state, text[index])
            if self._match[state]:
                end = index + 1
                self._held = ""
                return text[: end if self._keep else end - self._match[state]], True
        self._state = state
        shown = len(text) - self._depth[state]
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """The text held back, when nothing more will come."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
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
                following = self._next[state, char] = len(self._depth)
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
                self._fallback.append(0)
            state = following
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Give every state the state of its longest proper suffix, shallow states first."""
        edges: dict[int, list[tuple[str, int]]] = {}
        for (state, char), following in self._next.items():
            edges.setdefault(state, []).append((char, following))
        queue = deque(following for _, following in edges.get(0, ()))
        while queue:
            state = queue.popleft()
            if not self._match[state]:
                self._match[state] = self._match[self._fallback[state]]
            for char, following in edges.get(state, ()):
                self._fallback[following] = self._step(self._fallback[state], char)
                queue.append(following)
