"""Several answers at once: `n`, `best_of`, a batch of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tgi_server.http.generation import Job, Maker, Piece, generate

_AHEAD_PIECES = 64  # how far answers may run ahead of a slow reader


async def generate_each(maker: Maker, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(which answer, its next piece) of every job's answers, as they come.

    Job j has the answers from j * choices on; the jobs share their parameters. An error of one answer ends
    them all. Closing cancels.
    """
    choices = jobs[0].parameters.choices
    if len(jobs) * choices == 1:
        async with aclosing(generate(maker, jobs[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(_AHEAD_PIECES)

    async def pump(index: int) -> None:
        job, choice = jobs[index // choices], index % choices
        try:
            async with aclosing(generate(maker, job, choice)) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
        except Exception as error:
            await queue.put(error)
        await queue.put(None)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(jobs) * choices)]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(maker: Maker, jobs: Sequence[Job]) -> list[list[Piece]]:
    """The pieces of every answer, once all are complete."""
    answers: list[list[Piece]] = [[] for _ in range(len(jobs) * jobs[0].parameters.choices)]
    async with aclosing(generate_each(maker, jobs)) as pieces:
        async for index, piece in pieces:
            answers[index].append(piece)
    return answers
