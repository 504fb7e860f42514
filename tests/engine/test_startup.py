"""What a start says of itself: phases, how far the weights are, and the plan before anything is allocated."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.server import DEMO, ROOT, running_server
from tgi_server.config import EngineConfig, ModelConfig
from tgi_server.engine.__main__ import _planned
from tgi_server.engine.request import EngineStatus
from tgi_server.engine.startup import Startup
from tgi_server.errors import StartupError

GB = 10**9


def test_the_age_of_a_process_is_counted_from_its_start() -> None:
    code = "import time\nfrom tgi_server.process import age_s\nfirst = age_s()\ntime.sleep(0.3)\nprint(first, age_s())"
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    first, second = map(float, said.stdout.split())
    assert first > 0 and second - first >= 0.3 and second <= time.monotonic() - began + 0.05


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A source whose every tensor takes a while, of ten megabytes each."""

    folder = Path("somewhere")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def names(self) -> frozenset[str]:
        return frozenset(("a",))

    def shape(self, name: str) -> tuple[int, ...]:
        del name
        return (4,)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        del name
        self._clock.now += self._seconds
        return torch.empty(shape, dtype=torch.uint8)


def test_phases_are_told_as_they_begin_and_summed_up_with_the_libraries() -> None:
    told: list[EngineStatus] = []
    clock = Clock()
    startup = Startup(told.append, clock)
    for name, seconds in (("weights", 4.0), ("cache and graphs", 1.5)):
        with startup.phase(name):
            clock.now += seconds
    assert [(status.phase, status.detail) for status in told] == [
        ("loading", "weights"),
        ("loading", "cache and graphs"),
    ]
    found = re.fullmatch(
        r"loaded in ([\d.]+) s: libraries ([\d.]+), weights 4\.0, cache and graphs 1\.5", startup.summary()
    )
    assert found is not None and float(found[1]) == pytest.approx(5.5 + float(found[2]), abs=0.11)


def test_reading_is_told_four_times_a_second_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    told: list[EngineStatus] = []
    clock = Clock()
    source = Startup(told.append, clock).watched(Slow(clock, 0.1), 40 * 10**7)
    assert source.names() == {"a"} and source.folder == Path("somewhere")
    with caplog.at_level(logging.INFO):
        for i in range(40):
            assert source.read(f"tensor {i}", (10**7,)).nbytes == 10**7
    assert len(told) == 13, "every third of a read's tenth of a second"
    assert told[0].detail == "weights, 8%: 0.0 of 0.4 GB"
    assert [record.message for record in caplog.records] == [
        "[######--------------] weights, 30%: 0.1 of 0.4 GB, 0.1 GB/s",
        "[############--------] weights, 60%: 0.2 of 0.4 GB, 0.1 GB/s",
        "[##################--] weights, 90%: 0.4 of 0.4 GB, 0.1 GB/s",
    ]


def test_a_tensor_that_is_read_twice_counts_once() -> None:
    told: list[EngineStatus] = []
    clock = Clock()
    source = Startup(told.append, clock).watched(Slow(clock, 1.0), 10**8)
    for _ in range(3):
        source.read("tied", (10**7,))
    assert [status.detail for status in told] == ["weights, 10%: 0.0 of 0.1 GB"]


def config_of(folder: Path, **changes: object) -> EngineConfig:
    settings: dict[str, Any] = {
        "model": folder, "max_total_tokens": 2048, "max_batch_tokens": 256, "max_sequences": 8, "max_queue": 8,
        "num_pages": 0, "num_threads": 1, "device": "cuda", **changes,
    }  # fmt: skip
    return EngineConfig(**settings)


def test_the_plan_of_a_gpu_is_logged_and_sets_the_pages_before_anything_is_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ModelConfig.from_folder(DEMO)
    with caplog.at_level(logging.INFO):
        assert _planned(config_of(DEMO), model, 80 * GB).num_pages == 8 * 2048 // 16, "all that can be filled"
    lines = {record.message.split("  ")[0]: record.message.split()[-2:] for record in caplog.records}
    assert {"weights", "activations, tables", "graphs", "reserve", "KV cache", "fits"} <= set(lines)
    assert lines["memory of each"] == ["74.51", "GiB"]
    assert _planned(config_of(DEMO, num_pages=200), model, 80 * GB).num_pages == 200, "a bound that was given"
    tight = _planned(config_of(DEMO), model, 4_800_000_000).num_pages
    assert 2048 // 16 <= tight < 8 * 2048 // 16
    with pytest.raises(StartupError, match=r"--max-total-tokens \d+ would fit|only .* of memory are usable"):
        _planned(config_of(DEMO), model, 4 * GB)


def test_models_the_plan_does_not_know_are_left_to_be_counted() -> None:
    model = ModelConfig.from_dict(
        {**json.loads((DEMO / "config.json").read_text()), "quantization_config": {"quant_method": "aqlm"}},
        {},
    )
    config = config_of(DEMO)
    assert _planned(config, model, 5 * GB) is config


def test_a_real_start_logs_its_plan_its_phases_and_how_long_it_took() -> None:
    with running_server("--max-total-tokens", "256", "--max-batch-total-tokens", "4096") as server:
        log = server.log
    plan, loaded, ready = (log.index(word) for word in ("tokens of cache", "loaded in", "s after the start"))
    assert plan < loaded < ready, "the plan comes before anything is loaded"
    seconds = re.search(r"loaded in ([\d.]+) s: libraries ([\d.]+), weights and cache ([\d.]+)", log)
    assert seconds is not None
    assert float(seconds[1]) == pytest.approx(float(seconds[2]) + float(seconds[3]), abs=0.11)


def anonymous_bytes(process: psutil.Process) -> int:
    """Memory of its own, without pages of files, which are given up when needed."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


WORDS = ("word", "one", "two", "three", "four", "five")


def test_a_cpu_server_takes_what_its_plan_said_within_three_percent() -> None:
    options = ("--max-total-tokens", "1024", "--max-batch-total-tokens", "4096", "--max-sequences", "4")
    with running_server(*options, "--max-batch-tokens", "1024") as server, ThreadPoolExecutor(1) as pool:
        front = psutil.Process(server.process.pid)
        processes = [front, *front.children(recursive=True)]
        # Different prompts, more than the cache holds: memory of the cache is taken when it is first written.
        bodies = [{"inputs": f"{word} " * 950, "parameters": {"max_new_tokens": 2}} for word in WORDS]
        asked = pool.submit(lambda: [server.post("/generate", body) for body in bodies])
        peaks = [0] * len(processes)
        while not asked.done():
            peaks = [
                max(peak, anonymous_bytes(process)) for peak, process in zip(peaks, processes, strict=True)
            ]
            time.sleep(0.01)
        asked.result()
        log = server.log
    planned = 0.0
    for row in ("weights", "activations, tables", "reserve", "KV cache"):
        found = re.search(rf"INFO {row} +([\d.]+) GiB", log)
        assert found is not None, row
        planned += float(found[1]) * 2**30
    assert sum(peaks) == pytest.approx(planned, rel=0.03), [peak >> 20 for peak in (*peaks, int(planned))]
