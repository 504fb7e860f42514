from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.server import Server, running_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what servers of tests compute on that do not say it themselves [auto: a GPU if there is one]",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (device := config.getoption("--engine-device")) != "auto":
        os.environ["DEVICE"] = device


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the demo model, shared by tests that leave it as they found it."""
    with running_server() as started:
        yield started
