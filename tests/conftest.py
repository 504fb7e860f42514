from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import Server, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the demo model, shared by tests that leave it as they found it."""
    with running_server() as started:
        yield started
