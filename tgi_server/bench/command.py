"""`tgi-server bench`: how long prefill and decode take at several batch sizes, over HTTP, as clients see it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from tgi_server.bench.figures import Case, as_json, table
from tgi_server.bench.load import Server, Shape, open_session, run_batch, served_model
from tgi_server.bench.options import BATCHES, SAMPLING
from tgi_server.errors import StartupError
from tgi_server.flags import FLAGS


def bench(given: Mapping[str, object], values: Mapping[str, object]) -> int:
    """Measure and print.

    given: what the command line said. values: the server's options, from wherever they come.
    Raises StartupError if there is nothing to measure or the server refuses what is asked of it.
    """
    sizes = given["batch_size"]
    batches = sorted(set(sizes)) if isinstance(sizes, list) else list(BATCHES)
    shapes = [
        Shape(batch, int(str(given["sequence_length"])), int(str(given["decode_length"])))
        for batch in batches
    ]
    keys = values["api_key"]
    key = str(keys[0]) if isinstance(keys, tuple) and keys else None
    with _address(given, values, batches[-1]) as url:
        model, cases = asyncio.run(_measure(url, key, given, shapes))
    about = {
        "model": model,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sequence_length": shapes[0].prompt_tokens,
        "decode_length": shapes[0].new_tokens,
    }
    print(f"\n{model}: {about['sequence_length']} + {about['decode_length']} tokens, times in ms\n")
    print(table(cases))
    path = given["json"]
    if isinstance(path, Path):
        try:
            path.write_text(json.dumps(as_json(cases, **about), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StartupError(f"--json {path} cannot be written: {error.strerror}") from None
    return 0


async def _measure(
    url: str, key: str | None, given: Mapping[str, object], shapes: Sequence[Shape]
) -> tuple[str, list[Case]]:
    runs, warmups = int(str(given["runs"])), int(str(given["warmups"]))
    sampling = {name: float(str(given[name])) for name in SAMPLING if given[name] is not None}
    rng, cases = random.Random(), []
    async with open_session(key) as session:
        server = Server(url, await served_model(session, url), sampling)
        for shape in shapes:
            for _ in range(warmups):
                await run_batch(session, server, shape, rng)
            cases.append(Case.of([await run_batch(session, server, shape, rng) for _ in range(runs)]))
            print(f"batch {shape.batch}: {runs} runs", file=sys.stderr, flush=True)
    return server.model, cases


@contextmanager
def _address(given: Mapping[str, object], values: Mapping[str, object], most: int) -> Iterator[str]:
    """That of the server given, or of one that lives as long as the measurement."""
    if given["url"]:
        yield str(given["url"]).rstrip("/")
        return
    if not values["model_id"]:
        raise StartupError("what is to be measured? Give a model, or a running server as --url")
    command = [sys.executable, "-m", "tgi_server.cli", "serve", *_serve_options(given, values, most)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield _ready_url(process)
        finally:
            process.terminate()


def _serve_options(given: Mapping[str, object], values: Mapping[str, object], most: int) -> list[str]:
    """What the command line said of the server, and room for the largest batch."""
    options: dict[str, object] = {"log_level": "warn"}
    options |= {flag.key: given[flag.key] for flag in FLAGS if flag.key in given}
    options |= {key: max(int(str(values[key] or 0)), most) for key in ("max_sequences", "max_queue")}
    options |= {"port": 0, "host": "127.0.0.1"}
    line = []
    for key, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            line += [f"--{key.replace('_', '-')}={one}"]
    return line


def _ready_url(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if ready := re.search(rb"is ready on (https?://\S+)", line):
            return ready.group(1).decode()
    raise StartupError(f"the server ended with status {process.wait()} before it was ready")
