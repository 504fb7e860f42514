"""A server whose engine loses its GPU: put `python -m tests.faults.poisoned_server` before its command."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from tgi_server import cli
from tgi_server.engine import launch


def start(command: list[str], **more: object) -> subprocess.Popen[bytes]:
    """What the server starts, with the engine of `tests.engine.poisoned_engine` in place of its own."""
    assert command[1:] == ["-m", "tgi_server.engine"], command
    return subprocess.Popen([*command[:2], "tests.engine.poisoned_engine"], **more)


if __name__ == "__main__":
    vars(launch)["subprocess"] = SimpleNamespace(Popen=start)
    sys.exit(cli.main(sys.argv[4:]))
