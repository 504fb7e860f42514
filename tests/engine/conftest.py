"""A model for the engine on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.gpu_rig import save_llama


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small llama."""
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path
