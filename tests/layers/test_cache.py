from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tgi_server.layers.cache import CacheSpec, pool_shape

SPEC = CacheSpec("pages", kv_heads=3, head_dim=64)


def test_the_pool_holds_what_its_layers_say_they_keep() -> None:
    shape = pool_shape([SPEC] * 5, 7)
    assert shape == (5, 7, 2, 3, 16, 64)
    size = 1
    for extent in shape:
        size *= extent
    assert size == 7 * sum(spec.page_values() for spec in [SPEC] * 5)


@pytest.mark.parametrize("other", [{"kind": "state"}, {"kv_heads": 1}, {"head_dim": 128}])
def test_layers_that_differ_are_refused_by_number(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer 2 keeps"):
        pool_shape([SPEC, SPEC, replace(SPEC, **other)], 7)
