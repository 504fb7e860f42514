"""What a machine can be made to lack, as commands to put before a server's; skipped where that is not allowed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

NOBODY = 54321  # a user that no file names


def in_namespace(setup: str, *kinds: str) -> list[str]:
    """A command that does `setup` in a shell where mounts (and `kinds`, such as --net) are its own, then goes on."""
    unshare = ["unshare", "--mount", *kinds, "sh", "-ec", f'{setup}; exec "$@"', "sh"]
    _allowed([*unshare, "true"])
    return unshare


def as_nobody() -> list[str]:
    """A command that goes on as a user without a name or a home, who is allowed nothing special."""
    command = ["unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}"]
    _allowed([*command, "true"])
    return command


def with_limit(limit: str) -> list[str]:
    """A command that goes on under a limit, such as `nofile=256:256`."""
    command = ["prlimit", f"--{limit}"]
    _allowed([*command, "true"])
    return command


@contextmanager
def control_group(controller: str, name: str, value: str) -> Iterator[list[str]]:
    """A command that goes on in a control group of its own, where `name` is `value`."""
    root = Path("/sys/fs/cgroup")
    parent = root / controller if (root / controller).is_dir() else root
    group = parent / f"test-{uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / name).write_text(value)
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        yield ["sh", "-ec", f'echo $$ > {group / "cgroup.procs"}; exec "$@"', "sh"]
    finally:
        group.rmdir()


def _allowed(command: Sequence[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"user {os.getuid()} may not do this: {done.stderr.strip()}")
