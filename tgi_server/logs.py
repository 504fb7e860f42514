"""Log lines for people or machines, written by a thread so that a reader that stops cannot stop the service."""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

from tgi_server.errors import StartupError

_BACKLOG_LINES = 10_000
_LAST_LINES_S = 1.0  # how long the end waits for what is still to be written

TOO_FEW_PROCESSES = "the limit of processes (ulimit -u, or the control group's pids.max) is too low"

_LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


@contextmanager
def logging_to_stderr(level: str, *, as_json: bool) -> Iterator[None]:
    """Log to standard error while inside. Lines that nobody reads are dropped once many wait.

    Raises StartupError if there may be no thread for it.
    """
    lines: queue.Queue[str | None] = queue.Queue(_BACKLOG_LINES)
    # Straight to the descriptor: a thread stuck in sys.stderr would hold its lock, which the interpreter's end needs.
    writer = threading.Thread(target=_Writer(2).run, args=(lines,), name="log", daemon=True)
    try:
        writer.start()
    except RuntimeError as error:
        raise StartupError(f"{error}: {TOO_FEW_PROCESSES}") from None
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


def announce(text: str) -> None:
    """Write to standard output, in a thread that may be stuck for ever if nobody reads it."""
    threading.Thread(target=_Writer(1).write, args=(text,), name="announce", daemon=True).start()


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


class _Writer:
    """Writes lines whole, or leaves them out: a disk may be full for a while, and then have room again."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_torn = False  # the last line was written in part

    def run(self, lines: queue.Queue[str | None]) -> None:
        while (line := lines.get()) is not None:
            self.write(line)

    def write(self, line: str) -> None:
        left = ("\n" * self._is_torn + line + "\n").encode("utf-8", "backslashreplace")
        whole = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError:  # no room, or nobody will ever read it; the service goes on
            self._is_torn = self._is_torn or len(left) < whole
        else:
            self._is_torn = False

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # whoever shares the descriptor made it non-blocking
            select.select([], [self._descriptor], [])
            return 0
