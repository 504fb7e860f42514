"""Log lines for people or machines, written by a thread so that a reader that stops cannot stop the service."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

_BACKLOG_LINES = 10_000
_LAST_LINES_S = 1.0  # how long the end waits for what is still to be written

_LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


@contextmanager
def logging_to_stderr(level: str, *, as_json: bool) -> Iterator[None]:
    """Log to standard error while inside. Lines that nobody reads are dropped once many wait."""
    lines: queue.Queue[str | None] = queue.Queue(_BACKLOG_LINES)
    writer = threading.Thread(target=_write, args=(lines,), name="log", daemon=True)
    writer.start()
    handler = _Handler(lines)
    handler.setFormatter(_JsonFormatter() if as_json else _PlainFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(_LEVELS[level])
    try:
        yield
    finally:
        root.removeHandler(handler)
        with suppress(queue.Full):
            lines.put_nowait(None)
            writer.join(_LAST_LINES_S)


class _Handler(logging.Handler):
    def __init__(self, lines: queue.Queue[str | None]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(self.format(record))


class _PlainFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """A message is one line whatever is in it: a client's text cannot forge another line or move the cursor."""
        record.message = "".join(
            char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
            for char in record.message
        )
        return super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    """An object a line, in ASCII: terminals know control characters that JSON itself does not escape."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _write(lines: queue.Queue[str | None]) -> None:
    # Straight to the descriptor: a thread stuck in sys.stderr would hold its lock, which the interpreter's end needs.
    descriptor = 2
    while (line := lines.get()) is not None:
        left = (line + "\n").encode("utf-8", "backslashreplace")
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:  # nobody will ever read it
            return
