"""Batches of streamed requests to a server that speaks OpenAI's completions, and when their tokens came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from tgi_server.errors import StartupError

_SILENCE_S = 600.0  # a server that says nothing for this long will not answer
# Ids that are pieces of words in any usual vocabulary, neither special nor single bytes: text follows from text,
# and a token whose text is whole is sent as soon as it is there.
_FIRST_ID, _LAST_ID = 300, 900


@dataclass(frozen=True)
class Shape:
    """What one run asks for: as many requests at once, each of so many tokens."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Run:
    """When the tokens of one batch came, each request's in seconds since the batch was sent."""

    shape: Shape
    tokens_s: Sequence[Sequence[float]]

    @property
    def prefill_s(self) -> float:
        """Until every request of the batch had its first token."""
        return max(times[0] for times in self.tokens_s)

    @property
    def whole_s(self) -> float:
        return max(times[-1] for times in self.tokens_s)

    @property
    def token_s(self) -> list[float]:
        """Of each request, the mean time between two of its tokens."""
        return [(times[-1] - times[0]) / (len(times) - 1) for times in self.tokens_s if len(times) > 1]

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts a second."""
        return self.shape.batch * self.shape.prompt_tokens / self.prefill_s

    @property
    def decode_rate(self) -> float:
        """Tokens of answers a second, of those that came once all requests were being answered."""
        begin = self.prefill_s
        late = [time for times in self.tokens_s for time in times if time > begin]
        return len(late) / (max(late) - begin) if late else 0.0


@dataclass(frozen=True)
class Server:
    """Where to send requests, and what they all say."""

    url: str
    model: str
    sampling: Mapping[str, float]

    def body(self, rng: random.Random, shape: Shape) -> dict[str, object]:
        """A prompt of random ids, which no cache has seen, and an answer that does not end early."""
        prompt = [rng.randint(_FIRST_ID, _LAST_ID) for _ in range(shape.prompt_tokens)]
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": shape.new_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **self.sampling,
        }


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """Connections without a bound on their number, so that a batch arrives as one."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_S)
    return aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
    )


async def served_model(session: aiohttp.ClientSession, url: str) -> str:
    """The name of the model at `url`. Raises StartupError if nothing there answers as a server does."""
    try:
        async with session.get(f"{url}/v1/models") as response:
            if response.status != 200:
                raise StartupError(
                    f"{url}/v1/models answers {response.status}: {(await response.text())[:200]}"
                )
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, OSError) as error:
        raise StartupError(
            f"no server answers at {url} ({error}); start one, or give a model in its place"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise StartupError(f"{url}/v1/models names no model; is a server of text generation there?") from None


async def run_batch(session: aiohttp.ClientSession, server: Server, shape: Shape, rng: random.Random) -> Run:
    """Send a batch and wait for all of it. Raises StartupError with the server's words if it refuses one."""
    bodies = [server.body(rng, shape) for _ in range(shape.batch)]
    begin = time.perf_counter()
    times = await asyncio.gather(*(_ask(session, server.url, body, begin) for body in bodies))
    for got in times:
        if len(got) != shape.new_tokens:
            raise StartupError(
                f"an answer of {shape.new_tokens} tokens was asked for, one of {len(got)} came; does this server "
                "know ignore_eos and return_token_ids?"
            )
    return Run(shape, times)


async def _ask(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, object], begin: float
) -> list[float]:
    """When each token came, in seconds since `begin`."""
    events: list[tuple[float, bytes]] = []
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise StartupError(f"the server answers {response.status}: {_words(await response.text())}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    events.append((time.perf_counter() - begin, line))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise StartupError(f"the server at {url} broke off an answer: {error}") from None
    # Read only now: while tokens come, the client must not keep the server's processor busy.
    return [when for when, line in events for _ in range(_tokens(line))]


def _tokens(line: bytes) -> int:
    """How many tokens an event brought; a server that does not list them sends one an event."""
    try:
        event = json.loads(line[6:])
        if "error" in event:
            raise StartupError(f"an answer broke off: {_words(line[6:].decode())}")
        choices = event["choices"]
        return len(choices[0].get("token_ids") or [0]) if choices else 0
    except (ValueError, LookupError, TypeError, AttributeError):
        raise StartupError(f"an event that is none of OpenAI's completions came: {line[:200]!r}") from None


def _words(text: str) -> str:
    """What an error's body says, whichever API's shape it has."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return text[:300]
