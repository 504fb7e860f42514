"""A Hub that misbehaves on request: the owner of a repository says how."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

_PIECE_BYTES = 256 * 1024
COMMIT = "c0ffee" + "0" * 34
WEIGHTS = b"".join(
    bytes([i % 251]) * 1024 for i in range(24 * 1024)
)  # 24 MiB: the library keeps what it got in pieces of 10
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
FILES = {**SMALL, "model.safetensors": WEIGHTS}

# What the Hub answers for a repository as a whole: status, and the header its library looks at.
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "gone": (404, "RepoNotFound"),
    "busy": (429, ""),
    "broken": (500, ""),
    "down": (503, ""),
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def etag_of(name: str) -> str:
    """As the Hub has it: large files by SHA-256, small ones as git names them."""
    data = FILES[name]
    if name.endswith(".safetensors"):
        return sha256(data)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """`owner/model` for these owners: those of REFUSALS; cut, once-cut, slow (2 s), stalled; all others are well."""

    url: str = ""
    sent: dict[str, int] = field(default_factory=dict)  # bytes of weights sent, by owner
    ranges: list[str] = field(default_factory=list)  # as downloads that go on asked for them
    tokens: set[str] = field(default_factory=set)  # that requests carried
    _cut: set[str] = field(default_factory=set)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/models/{owner}/{name}/revision/{revision}", self._about)
        app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", self._tree)
        app.router.add_get("/{owner}/{name}/resolve/{revision}/{file}", self._file)
        return app

    async def _about(self, request: web.Request) -> web.Response:
        owner = request.match_info["owner"]
        self.tokens.add(request.headers.get("Authorization", ""))
        if owner in REFUSALS:
            status, code = REFUSALS[owner]
            return web.Response(status=status, headers={"X-Error-Code": code} if code else {})
        siblings = [{"rfilename": name} for name in FILES]
        return web.json_response({"id": f"{owner}/model", "sha": COMMIT, "siblings": siblings})

    async def _tree(self, request: web.Request) -> web.Response:
        del request
        return web.json_response(
            [{"type": "file", "path": n, "size": len(b), "oid": etag_of(n)} for n, b in FILES.items()]
        )

    async def _file(self, request: web.Request) -> web.StreamResponse:
        owner, name = request.match_info["owner"], request.match_info["file"]
        data = FILES[name]
        headers = {"ETag": f'"{etag_of(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        asked = request.headers.get("Range", "")
        if asked.startswith("bytes=") and request.method == "GET":
            start = int(asked[6:].split("-")[0])
            if start:
                self.ranges.append(asked)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if "Content-Range" in headers else 200, headers=headers)
        response.content_length = len(data) - start
        await response.prepare(request)
        if request.method == "HEAD" or name != "model.safetensors":
            await response.write(b"" if request.method == "HEAD" else data[start:])
            return response
        await self._send(request, response, owner, data[start:])
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, owner: str, data: bytes
    ) -> None:
        for at in range(0, len(data), _PIECE_BYTES):
            cut = owner == "cut" or (owner == "once-cut" and owner not in self._cut)
            if cut and at >= len(data) // 2:
                self._cut.add(owner)
                assert request.transport is not None
                request.transport.close()
                return
            try:
                await response.write(data[at : at + _PIECE_BYTES])
            except ConnectionError:  # the client was killed
                return
            self.sent[owner] = self.sent.get(owner, 0) + len(data[at : at + _PIECE_BYTES])
            if owner == "slow":
                await asyncio.sleep(2.0 * _PIECE_BYTES / len(WEIGHTS))
            if owner == "stalled":
                await asyncio.sleep(60)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port, in a thread of its own."""
    hub, loop, ready = Hub(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        runner = web.AppRunner(hub.app(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
        await site.start()
        host, port = runner.addresses[0][:2]
        hub.url = f"http://{host}:{port}"
        ready.set()
        await stopped.wait()
        await runner.cleanup()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # what still sends slowly

    stopped = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield hub
    loop.call_soon_threadsafe(stopped.set)
    thread.join(10)
    loop.close()


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    """What makes a process use this hub and no other, and wait no longer than a test may."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


def download(hub: Hub, model: str, cache: Path, **more: str) -> subprocess.Popen[str]:
    """`tgi-server download`, begun."""
    command = [sys.executable, "-m", "tgi_server.cli", "download", model]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub, cache, **more),
    )


def ended(process: subprocess.Popen[str], within_s: float = 60) -> tuple[int, str, str]:
    """Status, the last line of output, all of standard error."""
    out, err = process.communicate(timeout=within_s)
    return process.returncode, out.strip(), err


def snapshot(cache: Path, model: str) -> Path:
    return cache / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / COMMIT


def is_whole(folder: Path) -> bool:
    return all((folder / name).read_bytes() == data for name, data in FILES.items())
