"""Starting the engine process and noticing its end. Knows no torch."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

from tgi_server.config import EngineConfig
from tgi_server.engine.channel import encode_config
from tgi_server.engine.client import EngineClient
from tgi_server.errors import StartupError
from tgi_server.logs import TOO_FEW_PROCESSES

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class EngineProcess:
    """A running engine, its client, and a future that is done when the process has ended."""

    process: subprocess.Popen[bytes]
    client: EngineClient
    ended: asyncio.Future[int]  # its exit status; negative: the signal

    @property
    def last_words(self) -> str:
        """Why it has ended: what it said itself, or what the kernel says."""
        if self.client.status.phase == "failed":
            return self.client.status.detail
        return f"the engine process {_end_of(self.ended.result())}"

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Hang up and wait; kill it if it does not end, or is loading and would notice only after that."""
        if not self.client.ready and not self.ended.done():
            self.process.kill()
        await self.client.close()
        await asyncio.wait({self.ended}, timeout=timeout_s)
        if not self.ended.done():
            self.process.kill()
        await self.ended


async def start_engine(config: EngineConfig) -> EngineProcess:
    """Start `python -m tgi_server.engine` on one end of a socket pair and connect to the other.

    Must be called from the main thread: the engine dies with the thread that started it. Raises StartupError if
    there may be no more processes.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "tgi_server.engine"],
                stdin=theirs.fileno(),
                start_new_session=True,  # Ctrl-C in the terminal is the front end's to handle
            )
        except OSError as error:
            raise StartupError(f"no process can be started ({error.strerror}): {TOO_FEW_PROCESSES}") from None
    ours.setblocking(True)
    ours.sendall(encode_config(config))
    client = await EngineClient.connect(ours)
    return EngineProcess(process, client, _watch(process, client))


def _watch(process: subprocess.Popen[bytes], client: EngineClient) -> asyncio.Future[int]:
    """See the end of the process through its pidfd, whatever became of the socket.

    Both say so only when its memory is freed, which takes a second for the gigabytes of a cache. Clients need not
    wait for that: the process is a zombie from the moment it is killed.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    pidfd = os.pidfd_open(process.pid)
    # Open from the start, for clients may use up the files that this process may have open.
    stat = os.open(f"/proc/{process.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def look() -> None:
        if ended.done():
            return
        if _state_of(os.pread(stat, 4096, 0)) == b"Z":
            client.mark_dead("the engine process has ended")
        else:
            loop.call_later(_LOOK_EVERY_S, look)

    def on_end() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        os.close(stat)
        status = process.wait()
        client.mark_dead(f"the engine process {_end_of(status)}")
        ended.set_result(status)

    loop.add_reader(pidfd, on_end)
    loop.call_later(_LOOK_EVERY_S, look)
    return ended


def _state_of(stat: bytes) -> bytes:
    """The letter behind the name of the program, which may itself hold blanks and brackets (proc(5))."""
    return stat.rpartition(b")")[2].split()[0]


# What the kernel ends a process with, and what it then usually was.
_CAUSES = {
    signal.SIGKILL: "the machine or the control group may be out of memory",
    signal.SIGBUS: "a file of the checkpoint was cut short while it was read",
}


def _end_of(status: int) -> str:
    """In words; a negative status is the signal's number, negated."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        number = signal.Signals(-status)
    except ValueError:
        return f"was ended by signal {-status}"
    cause = f": {_CAUSES[number]}" if number in _CAUSES else ""
    return f"was ended by {number.name}{cause}"
