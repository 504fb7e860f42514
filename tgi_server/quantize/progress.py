"""How far `tgi-server quantize` is."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line for each layer, with what is left of the time."""

    def __init__(self, total: int) -> None:
        self._total, self._count, self._computed = total, 0, 0
        self._begin = self._spent_s = 0.0

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self) -> None:
        """A layer's codes are looked for from now on; reading text before it counts for nothing."""
        self._begin = time.monotonic()

    def done(self, layer: str, how: str) -> None:
        self._count += 1
        if not how:
            self._computed += 1
            self._spent_s += time.monotonic() - self._begin
        left = self._spent_s / max(1, self._computed) * (self._total - self._count)
        bar = "#" * (30 * self._count // self._total)
        self.say(f"[{bar:<30}] {self._count}/{self._total} {layer} {how or f'{left:.0f} s left'}")
