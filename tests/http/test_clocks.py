"""Silence that lasts, and clocks that jump: rows 81 and 96 of `docs/faults.md`."""

from __future__ import annotations

import time

import pytest

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine


async def test_row_81_liveness_fails_after_its_threshold_and_recovers(start: Start) -> None:
    engine = FakeEngine()
    client = await start(engine)
    for silent_s, status in ((29.0, 200), (31.0, 503), (0.1, 200)):
        engine.silent_s = silent_s
        assert (await client.get("/livez")).status == status


async def test_row_96_a_wall_clock_that_jumps_changes_no_time_limit_and_no_id(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(FakeEngine(script=[104, 105]))
    ids, day_s = set(), 86_400.0
    now = time.time()
    for jump_s in (0.0, day_s, -day_s, 0.0):
        monkeypatch.setattr(time, "time", lambda at=now + jump_s: at)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        for _ in range(3):
            response = await client.post("/v1/completions", json=body)
            assert response.status == 200
            ids.add((await response.json())["id"])
        assert (await client.get("/health")).status == 200
    assert len(ids) == 12
    metrics = await (await client.get("/metrics")).text()
    (total,) = [line for line in metrics.splitlines() if line.startswith("tgi_request_duration_sum")]
    assert 0 <= float(total.split()[1]) < 60
