from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest
from aiohttp.test_utils import TestClient, TestServer

from tests.http.conftest import ALL, Start
from tests.http.fake_engine import FakeEngine
from tests.http.test_streams import until
from tgi_server.engine.request import EngineStatus
from tgi_server.errors import ErrorKind, UserError
from tgi_server.http.ops import make_metrics_app

Say = Callable[..., FakeEngine]
CHAT = {"messages": [{"role": "user", "content": "hello"}]}

OF_TGI = {
    "tgi_request_count": "counter",
    "tgi_request_success": "counter",
    "tgi_request_failure": "counter",
    "tgi_batch_inference_count": "counter",
    "tgi_batch_inference_success": "counter",
    "tgi_batch_inference_failure": "counter",
    "tgi_queue_size": "gauge",
    "tgi_batch_current_size": "gauge",
    "tgi_batch_current_max_tokens": "gauge",
    "tgi_batch_max_total_tokens": "gauge",
    "tgi_request_duration": "histogram",
    "tgi_request_validation_duration": "histogram",
    "tgi_request_queue_duration": "histogram",
    "tgi_request_inference_duration": "histogram",
    "tgi_request_mean_time_per_token_duration": "histogram",
    "tgi_request_generated_tokens": "histogram",
    "tgi_request_input_length": "histogram",
    "tgi_request_max_new_tokens": "histogram",
    "tgi_batch_next_size": "histogram",
    "tgi_batch_inference_duration": "histogram",
    "tgi_batch_forward_duration": "histogram",
}


async def scrape(client: TestClient) -> dict[str, float]:
    """Every sample by its name and labels."""
    text = await (await client.get("/metrics")).text()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples.items()}


async def test_every_line_is_in_prometheus_text_format_and_every_name_of_tgi_is_there(
    start: Start, say: Say
) -> None:
    client = await start(say("hello"))
    response = await client.get("/metrics")
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = await response.text()
    sample = re.compile(r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,le="[^"]+")?\})? [-+.e\d]+')
    kinds = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds, "each name is described once"
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
    assert OF_TGI.items() <= kinds.items()


async def test_the_format_is_what_prometheus_own_parser_reads(start: Start, say: Say) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    client = await start(say("hello"))
    await client.post("/generate", json={"inputs": "x"})
    families = list(parser.text_string_to_metric_families(await (await client.get("/metrics")).text()))
    assert len(families) > 30


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "x"}),
        ("/generate_stream", {"inputs": "x"}),
        ("/", {"inputs": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/invocations", CHAT),
        ("/vertex", {"instances": [{"inputs": "x"}, {"inputs": "x"}]}),
    ],
)
async def test_each_request_is_counted_once(start: Start, say: Say, path: str, body: object) -> None:
    client = await start(say("hello wé", delay_s=0.002))
    await (await client.post(path, json=body)).read()
    found = await scrape(client)
    answers = 2 if path == "/vertex" else 1
    assert found["tgi_request_count"] == found["tgi_request_success"] == 1
    assert sum(value for name, value in found.items() if name.startswith("tgi_request_failure")) == 0
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration", "input_length"):
        assert found[f"tgi_request_{name}_count"] == 1
    assert found["tgi_request_queue_duration_sum"] == 0.002
    assert found["tgi_generated_tokens_total"] == found["tgi_request_generated_tokens_sum"]
    assert found["tgi_time_to_first_token_seconds_count"] == 1
    assert found["tgi_inter_token_latency_seconds_count"] == found["tgi_generated_tokens_total"] - answers
    assert found["tgi_requests_active"] == 0


async def test_answers_of_one_request_are_no_more_requests(start: Start, say: Say) -> None:
    client = await start(say("hello"), honoured=ALL)
    await client.post("/v1/chat/completions", json={**CHAT, "n": 4, "temperature": 1})
    found = await scrape(client)
    assert found["tgi_request_count"] == found["tgi_request_generated_tokens_count"] == 1
    assert found["tgi_generated_tokens_total"] == 8


@pytest.mark.parametrize(
    ("kind", "cause", "rejected"),
    [
        (ErrorKind.OVERLOADED, "overloaded", 1),
        (ErrorKind.UNAVAILABLE, "unavailable", 1),
        (ErrorKind.GENERATION, "generation", 0),
        (ErrorKind.INCOMPLETE, "incomplete", 0),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_failures_are_counted_by_cause(
    start: Start, say: Say, kind: ErrorKind, cause: str, rejected: int, path: str
) -> None:
    client = await start(say("a", fail_at=0, failure=UserError(kind, "because")))
    await (await client.post(path, json={"inputs": "x"})).read()
    found = await scrape(client)
    assert found[f'tgi_request_failure{{err="{cause}"}}'] == found["tgi_request_count"] == 1
    assert found["tgi_request_success"] == 0
    reasons = [value for name, value in found.items() if name.startswith("tgi_request_rejections_total")]
    assert sum(reasons) == rejected


async def test_an_error_in_the_middle_of_a_stream_is_a_failure(start: Start, say: Say) -> None:
    failure = UserError(ErrorKind.UNAVAILABLE, "the engine has ended")
    client = await start(say("hello", fail_at=1, failure=failure))
    await (await client.post("/generate_stream", json={"inputs": "x"})).read()
    found = await scrape(client)
    assert found['tgi_request_failure{err="unavailable"}'] == 1
    assert found['tgi_request_rejections_total{reason="unavailable"}'] == 0


async def test_what_is_invalid_is_a_validation_failure(start: Start, say: Say) -> None:
    client = await start(say("a"))
    for data in (b"{", b"{}", b'{"inputs": 5}'):
        await client.post("/generate", data=data)
    await client.post("/v1/chat/completions", json={"messages": [{"role": "tool", "content": "x"}]})
    found = await scrape(client)
    assert found['tgi_request_failure{err="validation"}'] == 3
    assert found['tgi_request_failure{err="template"}'] == 1


async def test_a_client_that_leaves_is_an_abort(start: Start, say: Say) -> None:
    engine = say("hello world", stall_at=2)
    client = await start(engine)
    task = asyncio.create_task(client.post("/generate", json={"inputs": "x"}))
    await until(lambda: engine.running == 1)
    assert (await scrape(client))["tgi_requests_active"] == 1
    task.cancel()
    await until(lambda: engine.running == 0)
    await asyncio.sleep(0.05)
    found = await scrape(client)
    assert found['tgi_request_failure{err="dropped"}'] == found["tgi_request_aborts_total"] == 1
    assert found["tgi_requests_active"] == 0


async def test_the_engines_numbers_come_from_its_status(start: Start) -> None:
    status = EngineStatus(
        phase="ready", waiting=3, running=2, free_pages=25, total_pages=100, prompt_tokens=90,
        prefix_hit_tokens=40, preemptions=1, prefill_steps=4, decode_steps=6, failed_decode_steps=1,
        prefill_s=0.5, stepped_sequences=20, prefill_step_buckets=[1, 0, 3, *[0] * 33],
        step_size_buckets=[2, 3, 5, *[0] * 9],
    )  # fmt: skip
    found = await scrape(await start(FakeEngine(status=status)))
    expected = {
        "tgi_engine_up": 1,
        "tgi_queue_size": 3,
        "tgi_batch_current_size": 2,
        "tgi_batch_current_max_tokens": 1200,
        "tgi_batch_max_total_tokens": 1600,
        "tgi_kv_cache_usage_ratio": 0.75,
        "tgi_prefix_cache_queried_tokens_total": 90,
        "tgi_prefix_cache_hit_tokens_total": 40,
        "tgi_preemptions_total": 1,
        'tgi_batch_inference_count{method="decode"}': 7,
        'tgi_batch_inference_failure{method="decode"}': 1,
        'tgi_batch_inference_duration_sum{method="prefill"}': 0.5,
        'tgi_batch_inference_duration_bucket{method="prefill",le="0.000225"}': 1,
        'tgi_batch_forward_duration_bucket{method="prefill",le="0.0003375"}': 4,
        'tgi_batch_inference_duration_count{method="prefill"}': 4,
        'tgi_batch_inference_duration_count{method="decode"}': 0,
        "tgi_batch_next_size_sum": 20,
        'tgi_batch_next_size_bucket{le="2"}': 5,
        'tgi_batch_next_size_bucket{le="1024"}': 10,
        "tgi_batch_next_size_count": 10,
    }
    assert expected.items() <= found.items()


async def test_metrics_may_have_a_port_of_their_own(start: Start, say: Say) -> None:
    client = await start(say("a"), prometheus_port=9000, api_keys=("right",))
    assert (await client.get("/metrics", headers={"Authorization": "Bearer right"})).status == 404
    async with TestClient(TestServer(make_metrics_app(client.app))) as alone:
        assert (await alone.get("/metrics")).status == 200
