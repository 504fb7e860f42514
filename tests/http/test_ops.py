from __future__ import annotations

import pytest
from yarl import URL

from tests.http.conftest import Start
from tests.http.fake_engine import FakeEngine
from tgi_server.engine.request import EngineStatus

PROBES = ["/health", "/readyz", "/ping", "/"]


@pytest.mark.parametrize("path", [*PROBES, "/livez"])
async def test_probes_are_200_when_the_engine_is_ready(start: Start, path: str) -> None:
    client = await start(FakeEngine())
    response = await client.get(path)
    assert response.status == 200
    assert await response.read() == b""
    assert (await client.head(path)).status == 200


@pytest.mark.parametrize("path", PROBES)
async def test_probes_name_the_phase_while_the_engine_loads(start: Start, path: str) -> None:
    client = await start(FakeEngine(status=EngineStatus(phase="loading", detail="42 %")))
    response = await client.get(path)
    assert response.status == 503
    assert await response.json() == {"error": "the engine is loading: 42 %", "error_type": "healthcheck"}
    assert (await client.get("/livez")).status == 200


@pytest.mark.parametrize(("silent_s", "ready", "live"), [(4.9, 200, 200), (5.1, 503, 200), (31, 503, 503)])
async def test_probes_fail_when_nothing_moves(start: Start, silent_s: float, ready: int, live: int) -> None:
    client = await start(FakeEngine(silent_s=silent_s))
    assert (await client.get("/health")).status == ready
    assert (await client.get("/livez")).status == live


@pytest.mark.parametrize(("waiting", "status"), [(3, 200), (4, 503)])
async def test_a_full_queue_is_not_ready_but_well(start: Start, waiting: int, status: int) -> None:
    client = await start(
        FakeEngine(status=EngineStatus(phase="ready", running=4, waiting=waiting)), max_queue=8
    )
    assert (await client.get("/readyz")).status == status
    for path in ("/health", "/ping", "/", "/livez"):
        assert (await client.get(path)).status == 200


async def test_probes_fail_when_the_engine_is_gone(start: Start) -> None:
    client = await start(FakeEngine(alive=False))
    assert (await client.get("/livez")).status == 503
    response = await client.get("/health")
    assert response.status == 503
    assert (await response.json())["error"] == "the engine is gone"


async def test_info_has_the_fields_of_tgi(start: Start) -> None:
    client = await start(FakeEngine())
    info = await (await client.get("/info")).json()
    assert info.pop("version")
    assert info.pop("engine")["phase"] == "ready"
    assert info == {
        "model_id": "tiny",
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 8,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": 199,
        "max_total_tokens": 200,
        "validation_workers": 1,
        "max_client_batch_size": 64,
        "router": "tgi-server",
        "sha": None,
        "docker_label": None,
    }


async def test_a_model_is_found_by_its_name_which_may_hold_a_slash(start: Start) -> None:
    client = await start(FakeEngine(), model_id="owner/name")
    for path in ("/v1/models/owner/name", "/v1/models/owner%2Fname"):
        response = await client.get(URL(path, encoded=True))
        assert (await response.json())["id"] == "owner/name"
    response = await client.get("/v1/models/other")
    assert response.status == 404
    assert (await response.json())["error"]["code"] == "model_not_found"


async def test_models_lists_the_one_served(start: Start) -> None:
    client = await start(FakeEngine())
    assert await (await client.get("/v1/models")).json() == {
        "object": "list",
        "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "tiny"}],
    }
