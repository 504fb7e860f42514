"""Machines that lack something. Numbers are rows of `docs/faults.md`."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest

from tests.faults.machine import as_nobody, control_group, in_namespace, with_limit
from tests.faults.tiny_model import write_model
from tests.server import Server, running_server
from tgi_server import cli, configure
from tgi_server.config import EngineConfig
from tgi_server.errors import StartupError
from tgi_server.listening import bound_sockets, take_addresses

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 8}}
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


def refusal(model: Path | str, *options: str, prefix: tuple[str, ...] | list[str] = ()) -> str:
    """What a start that fails says, in one line, with status 2."""
    command = [*prefix, sys.executable, "-m", "tgi_server.cli", "serve", str(model), *CPU, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


# ---- row 91: addresses


@pytest.fixture
def taken() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_row_91_a_port_in_use_is_named_before_the_model_is_looked_for(taken: int) -> None:
    error = refusal("/there/is/no/model", "--port", str(taken))
    assert f"cannot listen on 127.0.0.1:{taken}: port {taken} is in use" in error
    assert "--port" in error


def test_row_91_nothing_slow_is_imported_before_the_port_is_taken(taken: int) -> None:
    code = (
        "import sys\nfrom tgi_server import cli\n"
        "assert cli.main(['serve', 'x', '--port', sys.argv[1]]) == 2\n"
        "slow = {'torch', 'aiohttp', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\nassert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(taken)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_row_91_the_port_for_metrics_in_use_is_named_with_its_option(taken: int) -> None:
    error = refusal("/no/model", "--port", "0", "--prometheus-port", str(taken))
    assert f"port {taken} is in use" in error and "--prometheus-port" in error
    assert "both 4000" in refusal("/no/model", "--port", "4000", "--prometheus-port", "4000")


def test_row_91_a_privileged_port_needs_a_right_or_another_number(model: Path) -> None:
    error = refusal(model, "--port", "80", prefix=as_nobody())
    assert "127.0.0.1:80: this user may not take a port below 1024" in error


def test_row_91_an_address_of_another_machine_is_refused(model: Path) -> None:
    error = refusal(model, "--host", "192.0.2.1", "--port", "3999")
    assert "192.0.2.1:3999: this machine has no such address; choose another --host" in error


def test_row_91_without_ipv6_its_addresses_are_refused(model: Path) -> None:
    error = refusal(model, "--host", "::1", "--port", "3999", prefix=in_namespace("true", "--net"))
    assert "[::1]:3999: this machine has no such address" in error


def get_health(host: str, port: int) -> int:
    with closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


@pytest.mark.parametrize(("host", "reached_by"), [("::1", ["::1"]), ("::", ["::1", "127.0.0.1"])])
def test_row_91_ipv6_addresses_are_served(model: Path, host: str, reached_by: list[str]) -> None:
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    with running_server("--host", host, model=model) as server:
        assert f"http://[{host}]:" in server.url
        port = int(server.url.rsplit(":", 1)[1])
        assert [get_health(address, port) for address in reached_by] == [200] * len(reached_by)


def test_row_91_all_addresses_of_a_name_get_one_port_and_are_not_open_yet() -> None:
    addresses = take_addresses("localhost", 0, 0)
    with ExitStack() as stack:
        for bound in (*addresses.service, *addresses.metrics):
            stack.enter_context(bound)
        assert len({bound.getsockname()[1] for bound in addresses.service}) == 1
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(addresses.service[0].getsockname()[:2], timeout=5)


def test_row_91_a_host_that_is_none_is_refused() -> None:
    with pytest.raises(StartupError, match=r"--host no\.such\.host\.invalid is no address"):
        bound_sockets("no.such.host.invalid", 0)


# ---- rows 92 and 93: file systems


def answers(server: Server) -> bool:
    return bool(server.post("/generate", BODY)["generated_text"])


def test_row_93_a_root_nobody_may_write_and_a_user_without_name_and_home(model: Path) -> None:
    prefix = [*in_namespace("mount -o remount,bind,ro /"), *as_nobody()]
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    with running_server(model=model, prefix=prefix, environment=environment) as server:
        assert answers(server)
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        assert server.post("/v1/chat/completions", chat)["choices"]


def test_row_92_full_temporary_folders_change_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    inside = "mount -t tmpfs -o size=4k none /dev/shm; (yes > /dev/shm/full) 2>/dev/null || true"
    environment = {**os.environ, "TMPDIR": "/dev/shm"}
    with running_server(model=model, prefix=in_namespace(inside), environment=environment) as server:
        assert answers(server)


def test_row_93_no_shared_memory_is_needed(model: Path) -> None:
    prefix = in_namespace("mount -t tmpfs -o size=4k,ro none /dev/shm")
    with running_server(model=model, prefix=prefix) as server:
        assert answers(server)


# ---- row 94: limits


def answers_soon(server: Server, within_s: float = 10.0) -> bool:
    """Clients are turned away until the server has seen that the others have left."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return answers(server)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_row_94_a_low_limit_of_files_is_announced_and_survived(model: Path) -> None:
    with running_server(model=model, prefix=with_limit("nofile=256:256")) as server:
        assert (
            "the limit of open files is 256: more than 224 clients at once will be turned away" in server.log
        )
        with ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(closing(socket.create_connection(server.address, timeout=10)))
            time.sleep(1)  # what the service does from time to time goes on meanwhile
        assert answers_soon(server)
        assert psutil.Process(server.process.pid).num_fds() < 256
        assert "Traceback" not in server.log


@pytest.mark.parametrize("most", ["1", "2", "3", "6"])
def test_row_94_too_few_processes_are_named(model: Path, most: str) -> None:
    with control_group("pids", "pids.max", most) as prefix:
        command = [*prefix, sys.executable, "-m", "tgi_server.cli", "serve", str(model), *CPU, "--port", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (1, 2)
        last = done.stderr.splitlines()[-1]
        assert "the limit of processes (ulimit -u, or the control group's pids.max) is too low" in last


@pytest.mark.parametrize(("most", "enough"), [("600M", True), ("200M", False)])
def test_row_94_the_memory_of_a_control_group_is_all_there_is(model: Path, most: str, enough: bool) -> None:
    name = "memory.max" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "memory.limit_in_bytes"
    with control_group("memory", name, most) as prefix:
        if not enough:
            assert "of memory are usable" in refusal(model, "--port", "0", prefix=prefix)
            return
        with running_server(*CPU, model=model, prefix=prefix) as server:
            (line,) = [line for line in server.log.splitlines() if "memory of each" in line]
            assert 0.3 < float(line.split()[-2]) < 0.6
            assert answers(server)


# ---- row 97: GPUs that are hidden, or are not there


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", " "])
def test_row_97_hiding_every_gpu_means_the_cpu(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setattr(configure, "_gpu_trouble", lambda: None)
    assert configure._device("auto", {"cuda_visible_devices": None}) == "cuda"
    assert configure._device("auto", {"cuda_visible_devices": "1"}) == "cuda"
    assert configure._device("auto", {"cuda_visible_devices": visible}) == "cpu"
    with pytest.raises(
        StartupError, match=r"--device cuda: CUDA_VISIBLE_DEVICES is '.*', which hides every GPU"
    ):
        configure._device("cuda", {"cuda_visible_devices": visible})


def test_row_97_a_gpu_that_is_asked_for_and_not_there_is_no_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    monkeypatch.setattr(configure, "_gpu_trouble", lambda: "no NVIDIA driver is loaded")
    assert cli.main(["serve", str(model), "--device", "cuda", "--port", "0"]) == 2
    assert "--device cuda: no NVIDIA driver is loaded; mend that or choose" in capsys.readouterr().err


@pytest.mark.parametrize("visible", ["7", "MIG-00000000-0000-0000-0000-000000000000", "GPU-none"])
def test_row_97_an_index_that_is_not_there_is_said_by_the_engine(model: Path, visible: str) -> None:
    config = EngineConfig(model, 64, 64, 1, 4, 4, 1, device="cuda")
    code = (
        "import sys\nfrom pathlib import Path\nfrom tgi_server.config import EngineConfig\n"
        "from tgi_server.engine.__main__ import _runner\nfrom tgi_server.engine.startup import Startup\n"
        f"_runner(EngineConfig(Path({str(config.model)!r}), 64, 64, 1, 4, 4, 1, device='cuda'), Startup(print))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
    )  # fmt: skip
    assert "StartupError: CUDA finds no GPU it can use; CUDA_VISIBLE_DEVICES may name one" in done.stderr


# ---- rows 113 and 114: paths, and code in a checkpoint


@pytest.mark.parametrize(
    "name", ["with spaces and 'quotes'", "模型 – ünï¢ødé 🦙", "a" * 150 + "/" + "b" * 150]
)
def test_row_113_odd_paths_are_served(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / name)
    with running_server(model=folder) as server:
        assert answers(server)
        assert server.get("/info")["model_id"] == folder.name


def test_row_113_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "no such folder" in refusal(tmp_path / "a", "--port", "0")
    folder = write_model(tmp_path / "model")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(name)
        assert name in refusal(folder, "--port", "0")
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize("name", ["x" * 300, "/tmp/" + "x" * 300, "/tmp/" + "x/" * 3000])
def test_row_113_names_no_file_system_takes_are_refused(name: str) -> None:
    assert "cannot be a folder: File name too long" in refusal(name, "--port", "0")


CANARY_CODE = "from pathlib import Path\nPath({path!r}).write_text('ran')\n"


@pytest.mark.parametrize("trusting", [(), ("--trust-remote-code",)])
@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_row_114_code_in_a_checkpoint_is_never_run(
    tmp_path: Path, model_type: str, trusting: tuple[str, ...]
) -> None:
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    folder = write_model(
        tmp_path / "model", model_type=model_type, auto_map={name: f"evil.{name}" for name in names}
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.AutoTokenizer", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for file in ("evil.py", "configuration_own.py", "modeling_own.py", "__init__.py", "conftest.py"):
        (folder / file).write_text(CANARY_CODE.format(path=str(tmp_path / "canary")))
    if model_type == "llama":
        with running_server(*trusting, model=folder) as server:
            assert answers(server)
    else:
        command = [
            sys.executable,
            "-m",
            "tgi_server.cli",
            "serve",
            str(folder),
            *CPU,
            "--port",
            "0",
            *trusting,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "is never run, --trust-remote-code changes nothing" in done.stderr
    assert not (tmp_path / "canary").exists()
