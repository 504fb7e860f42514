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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("alone") and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs the GPU to itself: run it without -n")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the demo model, shared by tests that leave it as they found it."""
    with running_server() as started:
        yield started
