"""A server with keys, TLS and a port for metrics, and how a server ends."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread

import pytest

from tests.server import Server, running_server

LONG = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4000}}
SHORT = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 60}}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get_status(server: Server, path: str, **headers: str) -> int:
    with closing(http.client.HTTPConnection(*server.address, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def test_keys_and_metrics_of_a_real_server(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n")
    port = free_port()
    options = ("--api-key", "from-flag", "--api-key-file", str(keys), "--prometheus-port", str(port))
    with running_server(*options, "--json-output") as server:
        assert get_status(server, "/health") == 200
        assert get_status(server, "/info") == 401
        for key in ("from-flag", "from-file"):
            assert get_status(server, "/info", Authorization=f"Bearer {key}") == 200
        for key in ("", "wrong", "FROM-FLAG", "from-flag\x80", "from-file,from-flag"):
            assert get_status(server, "/info", Authorization=f"Bearer {key}") == 401
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            assert b"tgi_request_count 0" in response.read()
        assert get_status(server, "/metrics", Authorization="Bearer from-flag") == 404
        time.sleep(0.2)
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        assert [line for line in lines if "GET /info 401" in line["message"]]
        assert "from-f" not in server.log


def test_row_26_tls_and_the_wrong_kind_of_client(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not there to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout"
    subprocess.run([openssl, *make.split(), str(key), "-out", str(cert)], check=True, capture_output=True)
    with running_server("--ssl-certfile", str(cert), "--ssl-keyfile", str(key)) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(cert))
        trusting.check_hostname = False
        with urllib.request.urlopen(server.url + "/health", context=trusting) as response:
            assert response.status == 200
        with socket.create_connection(server.address, timeout=10) as plain, suppress(ConnectionError):
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in plain.recv(1000)
        with urllib.request.urlopen(server.url + "/health", context=trusting) as response:
            assert response.status == 200
        assert "Traceback" not in server.log


def test_row_83_running_requests_finish_and_new_ones_are_sent_elsewhere() -> None:
    with running_server("--graceful-termination-timeout", "60") as server:
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": server.tokens_in(2.0)}}
        stream = server.stream("/generate_stream", body)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert get_status(server, "/readyz") == 503
        assert get_status(server, "/livez") == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/generate", SHORT)
        assert refused.value.code == 503
        assert refused.value.headers["Retry-After"]
        assert list(stream)[-1]["generated_text"]
        assert server.process.wait(timeout=15) == 0


@pytest.mark.parametrize("second", [True, False])
def test_rows_83_and_84_after_the_grace_or_a_second_signal_the_rest_is_broken_off(second: bool) -> None:
    with running_server("--graceful-termination-timeout", "600" if second else "0.5") as server:
        stream = server.stream("/generate_stream", LONG)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        last: list[dict[str, object]] = []
        reader = Thread(target=lambda: last.extend(stream))
        reader.start()
        if second:
            time.sleep(0.3)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=25) == (128 + signal.SIGTERM if second else 0)
        reader.join(timeout=10)
        assert last[-1]["error_type"] == "unavailable"


def test_row_85_other_signals_change_nothing(server: Server) -> None:
    for number in (signal.SIGHUP, signal.SIGPIPE):
        server.process.send_signal(number)
    time.sleep(0.2)
    assert get_status(server, "/health") == 200


def test_row_91_a_port_in_use_is_named_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(AssertionError, match="ended with 2"), running_server("--port", port):
            pass
