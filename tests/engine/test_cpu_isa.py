"""Which kernels an engine on a CPU computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.engine.test_client import CONFIG
from tests.server import running_server
from tgi_kernels import cpu
from tgi_server.engine.__main__ import set_up_cpu
from tgi_server.errors import StartupError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    isa, threads = cpu.isa(), cpu.num_threads()
    yield
    cpu.set_isa(isa)
    cpu.set_num_threads(threads)


@pytest.mark.parametrize("isa", cpu.available_isas())
def test_the_one_asked_for_is_used_and_reported(isa: str) -> None:
    assert set_up_cpu(replace(CONFIG, cpu_isa=isa)).cpu_isa == isa
    assert cpu.isa() == isa


def test_auto_is_what_is_in_use_which_is_the_best_there_is() -> None:
    cpu.set_isa(cpu.available_isas()[-1])
    assert set_up_cpu(CONFIG).cpu_isa == cpu.available_isas()[-1]


def test_one_that_this_machine_has_not_is_a_start_error_that_names_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "available_isas", lambda: ("baseline", "avx2"))
    with pytest.raises(StartupError, match=r"--cpu-isa avx512: this CPU has baseline, avx2; choose"):
        set_up_cpu(replace(CONFIG, cpu_isa="avx512"))


def test_a_server_shows_it_and_answers_with_it() -> None:
    with running_server("--cpu-isa", "baseline", "--max-total-tokens", "256") as server:
        body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 2}}
        assert server.post("/generate", body)["generated_text"] == " Paris."
        engine = server.get("/info")["engine"]
        assert isinstance(engine, dict) and engine["cpu_isa"] == "baseline"
