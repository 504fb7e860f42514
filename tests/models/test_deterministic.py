"""The flag that keeps bits is refused where it could not be kept."""

from __future__ import annotations

import pytest

from tgi_server.errors import StartupError
from tgi_server.models import _check_deterministic


def test_a_gpu_whose_products_are_a_librarys_cannot_keep_bits() -> None:
    _check_deterministic((9, 0))
    with pytest.raises(StartupError, match=r"capability 8\.0.* Leave it out"):
        _check_deterministic((8, 0))
