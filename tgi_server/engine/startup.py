"""How far a start is: its phases, timed, and the reading of weights, told to the front end and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from tgi_server.engine.request import EngineStatus
from tgi_server.layers.weights import Source
from tgi_server.process import age_s

log = logging.getLogger(__name__)

_TELL_EVERY_S = 0.25
_LOG_EVERY_S = 1.0
_BAR = 20


class Startup:
    """Phases that follow each other; the first, of libraries, began with the process."""

    def __init__(
        self, tell: Callable[[EngineStatus], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._done = {"libraries": age_s()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside; `/health` says its name meanwhile."""
        self.tell(name)
        began = self._clock()
        yield
        self._done[name] = self._done.get(name, 0.0) + self._clock() - began

    def tell(self, detail: str) -> None:
        self._tell(EngineStatus(phase="loading", detail=detail))

    def summary(self) -> str:
        """All phases and their sum, in seconds."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._done.items())
        return f"loaded in {sum(self._done.values()):.1f} s: {parts}"

    def watched(self, source: Source, total_bytes: int) -> Source:
        """`source`; how much of it has been read is told a few times a second and logged once a second."""
        return _Watched(source, total_bytes, self, self._clock)


class _Watched:
    """A source that counts what is asked of it. What it says it has read may still be on its way from the disk."""

    def __init__(
        self, source: Source, total_bytes: int, startup: Startup, clock: Callable[[], float]
    ) -> None:
        self.folder: Path = source.folder
        self._source = source
        self._total_bytes = max(1, total_bytes)
        self._startup = startup
        self._clock = clock
        self._read_bytes = 0
        self._seen: set[str] = set()
        self._told = self._logged = self._began = clock()

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._source.read(name, shape)
        if name not in self._seen:  # a tied head is the embedding once more
            self._seen.add(name)
            self._count(tensor.nbytes)
        return tensor

    def _count(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes
        now = self._clock()
        if now - self._told < _TELL_EVERY_S:
            return
        self._told = now
        share = min(1.0, self._read_bytes / self._total_bytes)
        text = f"weights, {share:.0%}: {self._read_bytes / 1e9:.1f} of {self._total_bytes / 1e9:.1f} GB"
        self._startup.tell(text)
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            filled = round(share * _BAR)
            rate = self._read_bytes / 1e9 / max(now - self._began, 1e-9)
            log.info("[%s%s] %s, %.1f GB/s", "#" * filled, "-" * (_BAR - filled), text, rate)
