"""Clients for `benchmarks.soak`: random lengths and routes, shared beginnings, some that hang up halfway."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

_WORDS = (
    "time",
    "river",
    "seven",
    "light",
    "number",
    "garden",
    "because",
    "stone",
    "music",
    "winter",
    "Ünï",
    "猫",
)
_SHARED_PROMPTS = 4  # beginnings that many prompts have in common: hits of the prefix cache
_MOST_EVENTS = 8  # after as many of a stream, at most, a client that will not wait for its answer hangs up
_MOST_PAUSE_S = 0.02  # and after this time where the answer comes at once


@dataclass(frozen=True)
class Mix:
    """What is asked. Lengths are in words and tokens, shares between 0 and 1."""

    clients: int = 16
    most_words: int = 30
    most_tokens: int = 60
    aborting: float = 0.5
    sharing: float = 0.4
    sampling: float = 0.5
    seed: int = 0


@dataclass
class Tally:
    """What became of requests: answered, aborted, refused (429 and 503), and failures by what they said."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0  # of answers, as far as they were read
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return self.outcomes.total()


async def drive(url: str, mix: Mix, tally: Tally, is_over: Callable[[], bool]) -> None:
    """Keep `mix.clients` clients busy until `is_over` of the requests begun so far; each has one request at a time."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        clients = [
            _client(session, mix, random.Random(f"{mix.seed} {number} {tally.requests}"), tally, is_over)
            for number in range(mix.clients)
        ]
        await asyncio.gather(*clients)


async def _client(
    session: aiohttp.ClientSession, mix: Mix, rng: random.Random, tally: Tally, is_over: Callable[[], bool]
) -> None:
    while not is_over():
        path, body = _request(mix, rng)
        leaves = rng.random() < mix.aborting
        events = rng.randrange(_MOST_EVENTS) if leaves else None
        pause_s = rng.uniform(0, _MOST_PAUSE_S) if leaves and not _is_streamed(path, body) else None
        try:
            outcome = await asyncio.wait_for(_ask(session, path, body, tally, events), pause_s)
        except asyncio.TimeoutError:
            outcome = "aborted"
        except (aiohttp.ClientError, OSError) as error:
            outcome = "failed"
            tally.failures[type(error).__name__] += 1
        tally.outcomes[outcome] += 1


def _is_streamed(path: str, body: dict[str, object]) -> bool:
    return path == "/generate_stream" or body.get("stream") is True


async def _ask(
    session: aiohttp.ClientSession, path: str, body: object, tally: Tally, most_events: int | None
) -> str:
    """Ask, and read the answer, or no more than so many events of it."""
    async with session.post(path, json=body) as response:
        events = 0
        async for line in response.content:
            events += line.startswith((b"data: {", b"data:{"))
            if b'"error"' in line:
                return _failed(tally, response.status, line)
            if most_events is not None and events > most_events:
                tally.tokens += events
                return "aborted"
        tally.tokens += events
        return "answered" if response.status == 200 else _failed(tally, response.status, b"")


def _failed(tally: Tally, status: int, line: bytes) -> str:
    if status in (429, 503):
        return "refused"
    tally.failures[f"{status} {line[:200].decode(errors='replace')}"] += 1
    return "failed"


def _request(mix: Mix, rng: random.Random) -> tuple[str, dict[str, object]]:
    shared = rng.randrange(_SHARED_PROMPTS)
    words = rng.choices(_WORDS, k=rng.randint(1, mix.most_words))
    beginning = (
        " ".join(_WORDS * (shared + 1))[: 8 * mix.most_words // 2] if rng.random() < mix.sharing else ""
    )
    prompt = f"{beginning} {' '.join(words)}"
    tokens = rng.randint(1, mix.most_tokens)
    sampled = rng.random() < mix.sampling
    seed = rng.randrange(1 << 32)
    kind = rng.randrange(4)
    if kind < 2:
        parameters = {"max_new_tokens": tokens, **({"do_sample": True, "seed": seed} if sampled else {})}
        return ("/generate", "/generate_stream")[kind], {"inputs": prompt, "parameters": parameters}
    drawn = {"temperature": 0.8, "seed": seed} if sampled else {"temperature": 0.0}
    common = {"max_tokens": tokens, "stream": rng.random() < 0.7, **drawn}
    if kind == 2:
        return "/v1/completions", {"prompt": prompt, **common}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **common}
