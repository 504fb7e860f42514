"""Signals, stopped and dying processes, logs nobody reads, clocks that jump, and values that are no numbers.

Numbers are rows of `docs/faults.md`. Each test has a server of its own.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.faults.conftest import until
from tests.faults.fake_hub import environment, running_hub
from tests.faults.tiny_model import tensors, write_model
from tests.server import ROOT, Server, running_server
from tgi_server.errors import ErrorKind

SHORT = {"inputs": "hello", "parameters": {"max_new_tokens": 8}}
LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 450, "stop": []}}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers end at their length: no token of the vocabulary is the end."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model", eos_token_id=None)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def get(server: Server, path: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(*server.address, timeout=10)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def metric(server: Server, name: str) -> float:
    lines = get(server, "/metrics")[1].decode().splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), 0.0)


# ---- rows 79 to 85: processes and signals


def test_row_79_between_the_engines_death_and_its_own_end_the_service_says_what_happened(model: Path) -> None:
    with running_server(model=model) as server:
        server.engine.send_signal(signal.SIGKILL)
        until(lambda: get(server, "/livez")[0] == 503, "liveness to fail", 1.0)
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/generate", SHORT)
        assert refused.value.code == 503
        assert server.process.wait(timeout=10) == 1
        assert (
            "the engine process was ended by SIGKILL: the machine or the control group may be out"
            in server.log
        )


def test_row_80_a_killed_front_end_takes_every_process_with_it(model: Path) -> None:
    with running_server(model=model) as server:
        server.post("/v1/chat/completions", CHAT)
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) == 2
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


def test_row_81_a_stopped_engine_is_not_ready_and_goes_on_where_it_was(model: Path) -> None:
    with running_server(model=model) as server:
        expected = list(server.stream("/generate_stream", LONG))[-1]
        stream = server.stream("/generate_stream", LONG)
        next(stream)
        server.engine.suspend()
        until(lambda: get(server, "/readyz")[0] == 503, "readiness to fail", 10)
        assert b"the engine has been silent for" in get(server, "/readyz")[1]
        assert get(server, "/livez")[0] == 200  # a restart would not help yet
        server.engine.resume()
        until(lambda: get(server, "/readyz")[0] == 200, "readiness to come back", 5)
        assert list(stream)[-1]["generated_text"] == expected["generated_text"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_row_81_liveness_fails_after_half_a_minute_of_silence_and_comes_back(model: Path) -> None:
    with running_server(model=model) as server:
        server.engine.suspend()
        began = time.monotonic()
        until(lambda: get(server, "/livez")[0] == 503, "liveness to fail", 45)
        assert time.monotonic() - began > 28
        server.engine.resume()
        until(lambda: get(server, "/livez")[0] == 200, "liveness to come back", 5)
        server.post("/generate", SHORT)


def test_row_83_a_signal_to_every_process_lets_requests_finish(model: Path) -> None:
    with running_server(model=model) as server:
        server.post("/v1/chat/completions", CHAT)
        expected = list(server.stream("/generate_stream", LONG))[-1]
        stream = server.stream("/generate_stream", LONG)
        next(stream)
        for process in (*psutil.Process(server.process.pid).children(), server.process):
            process.send_signal(signal.SIGTERM)
        assert list(stream)[-1]["generated_text"] == expected["generated_text"]
        assert server.process.wait(timeout=15) == 0


@contextmanager
def starting(model: Path | str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has only just been started."""
    command = [sys.executable, "-m", "tgi_server.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_82_a_signal_while_the_model_is_loaded_ends_it_at_once(
    model: Path, number: signal.Signals
) -> None:
    with starting(model) as process:
        until(lambda: bool(psutil.Process(process.pid).children()), "the engine to be started", 20)
        time.sleep(0.2)  # the handlers were set just before
        children = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert b"Traceback" not in err and b"ERROR" not in err
        assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_82_a_signal_while_the_model_is_fetched_ends_it_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    with running_hub() as hub, starting("slow/model", environment(hub, tmp_path)) as process:
        until(lambda: hub.sent.get("slow", 0) > 0, "the download to have begun", 20)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 128 + number
        assert b"Traceback" not in err


def test_row_85_signals_that_mean_nothing_change_nothing(model: Path) -> None:
    with running_server(model=model) as server:
        expected = server.post("/generate", SHORT)
        stream = server.stream("/generate_stream", LONG)
        next(stream)
        for process in (server.process, server.engine):
            for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2):
                process.send_signal(number)
        server.engine.send_signal(signal.SIGINT)
        assert "generated_text" in list(stream)[-1]
        assert server.post("/generate", SHORT) == expected
        until(lambda: "SIGUSR1 changes nothing; restart to read new options" in server.log, "a line about it")


# ---- row 89: values that are no numbers


def poisoned(folder: Path, name: str, row: int, value: float) -> Path:
    weights = tensors()
    weights[name][row] = value
    return write_model(folder, weights, eos_token_id=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_89_a_poisoned_token_fails_its_own_requests_alone(tmp_path: Path, value: float) -> None:
    clean, good = write_model(tmp_path / "clean", eos_token_id=None), {"inputs": "good", **_max(40)}
    with running_server(model=clean) as server:
        expected = server.post("/generate", good)["generated_text"]
    # "Q" is in no answer of this model to "good"; its vector is damaged.
    folder = poisoned(tmp_path / "poisoned", "model.embed_tokens.weight", token("Q", clean), value)
    with running_server(model=folder) as server:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                others = [pool.submit(answer, server, good) for _ in range(4)]
                assert failure(server, "/generate", {"inputs": "bad Q", **_max(40)}) == (424, "generation")
                assert [other.result() for other in others] == [expected] * 4
        chat = {"messages": [{"role": "user", "content": "Q"}], "max_tokens": 40}
        assert failure(server, "/v1/chat/completions", chat) == (500, "server_error")
        assert metric(server, 'tgi_request_failure{err="generation"}') == 4
        assert get(server, "/health")[0] == 200
        until(lambda: is_idle(server), "the engine to be idle")  # it says so twice a second
        assert "values that are no numbers (NaN or infinite)" in server.log


def is_idle(server: Server) -> bool:
    status = json.loads(get(server, "/info")[1])["engine"]
    return bool(status["running"] == status["waiting"] == 0)


def token(char: str, folder: Path) -> int:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return int(vocabulary[char])


def _max(tokens: int) -> dict[str, object]:
    return {"parameters": {"max_new_tokens": tokens}}


def answer(server: Server, body: object) -> str:
    return str(server.post("/generate", body)["generated_text"])


def failure(server: Server, path: str, body: object) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, body)
    error = json.loads(caught.value.read())
    return caught.value.code, error["error_type"] if "error_type" in error else error["error"]["type"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "parameters", [{}, {"do_sample": True, "seed": 1}, {"top_n_tokens": 2, "details": True}]
)
def test_row_89_a_poisoned_head_never_becomes_an_answer(
    tmp_path: Path, value: float, parameters: dict[str, object]
) -> None:
    folder = poisoned(tmp_path, "lm_head.weight", 7, value)
    with running_server(model=folder) as server:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 30, **parameters}}
        assert failure(server, "/generate", body) == (424, "generation")
        assert failure(server, "/generate_stream", body) == (424, "generation")
        score = {
            "inputs": "hello",
            "parameters": {"max_new_tokens": 1, "decoder_input_details": True, "details": True},
        }
        assert failure(server, "/generate", score) == (424, "generation")
        assert server.process.poll() is None


def test_row_89_damage_within_an_answer_ends_its_stream_with_an_error(tmp_path: Path) -> None:
    """The third token of this answer is the one whose vector is damaged."""
    clean = write_model(tmp_path / "clean", eos_token_id=None)
    with running_server(model=clean) as server:
        events = list(server.stream("/generate_stream", {"inputs": "hello", **_max(12)}))
    ids = [event["token"]["id"] for event in events]
    at = next(i for i, token_id in enumerate(ids) if i >= 2 and token_id not in ids[:i])
    folder = poisoned(tmp_path / "poisoned", "model.embed_tokens.weight", ids[at], float("nan"))
    with running_server(model=folder) as server:
        got = list(server.stream("/generate_stream", {"inputs": "hello", **_max(12)}))
    assert [event["token"]["id"] for event in got[:-1]] == ids[: at + 1]
    assert got[-1]["error_type"] == ErrorKind.GENERATION.value


def test_row_89_weights_of_nan_start_and_refuse(tmp_path: Path) -> None:
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors().items()}
    with running_server(model=write_model(tmp_path, weights)) as server:
        assert failure(server, "/generate", SHORT) == (424, "generation")
        assert get(server, "/health")[0] == 200


# ---- rows 92 and 95: logs that cannot be written


def filled_pipe() -> tuple[int, int]:
    """Both ends of a pipe that takes no more."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 512)
    except BlockingIOError:
        os.set_blocking(write, True)
        return read, write


@contextmanager
def server_with_output(model: Path, output: int, port: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "tgi_server.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    server = Server(process, f"http://127.0.0.1:{port}", Path(os.devnull))
    try:
        until(lambda: _is_ready(server), "the server to be ready", 60)
        yield server
        process.terminate()
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()


def _is_ready(server: Server) -> bool:
    assert server.process.poll() is None
    try:
        return get(server, "/health")[0] == 200
    except OSError:
        return False


def test_row_95_output_that_nobody_reads_stops_nothing(model: Path, free_port: int) -> None:
    read, write = filled_pipe()
    with server_with_output(model, write, free_port) as server:
        os.close(write)
        # A failing step makes the engine write, too.
        texts = {answer(server, SHORT) for _ in range(50)}
        assert len(texts) == 1
        stream = server.stream("/generate_stream", LONG)
        assert "generated_text" in list(stream)[-1]
    os.close(read)


def test_row_95_output_whose_reader_is_gone_stops_nothing(model: Path, free_port: int) -> None:
    read, write = os.pipe()
    os.close(read)
    with server_with_output(model, write, free_port) as server:
        assert len({answer(server, SHORT) for _ in range(20)}) == 1
    os.close(write)


def test_row_92_a_full_disk_under_the_log_stops_nothing(model: Path, free_port: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with server_with_output(model, full, free_port) as server:
        assert len({answer(server, SHORT) for _ in range(20)}) == 1
    os.close(full)


# ---- row 96: clocks that jump


def test_row_96_only_what_is_shown_to_people_reads_the_wall_clock() -> None:
    readers = {
        str(path.relative_to(ROOT / "tgi_server"))
        for path in (ROOT / "tgi_server").rglob("*.py")
        if "time.time()" in path.read_text(encoding="utf-8")
        or "datetime.now" in path.read_text(encoding="utf-8")
    }
    # The date in an answer, in a template, and in a benchmark's record.
    assert readers <= {"http/chat.py", "http/completions.py", "text/template.py", "bench/command.py"}
