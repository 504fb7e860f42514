"""Where texts are encoded that would keep the event loop from its streams for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from tgi_server.errors import ErrorKind, UserError

P = ParamSpec("P")
R = TypeVar("R")

# Seconds of work for a megabyte: a few clients that send such texts would hold every thread there is.
_LONG_CHARS = 50_000


class Threads:
    """Threads for texts of any length. The longest take turns in one of their own, so that others need not wait."""

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._waiting = 0  # long texts, with the one that is being worked on
        self._long = ThreadPoolExecutor(1, "long-text")

    async def run(self, chars: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`work`, on a text of so many characters. Raises UserError: OVERLOADED if too many long ones wait."""
        loop, call = asyncio.get_running_loop(), partial(work, *args, **kwargs)
        if chars <= _LONG_CHARS:
            return await loop.run_in_executor(None, call)
        if self._waiting >= self._most_waiting:
            message = f"{self._waiting} long texts wait to be encoded, the limit; try again later"
            raise UserError(ErrorKind.OVERLOADED, message)
        self._waiting += 1
        try:
            # A client that leaves takes its text out of the queue, but what has begun is done to its end.
            return await loop.run_in_executor(self._long, call)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._long.shutdown(wait=False, cancel_futures=True)
