"""What a user calls a model, and what is said when there is none. A fake Hub answers where one is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tgi_server.checkpoint.hub import model_folder
from tgi_server.errors import StartupError

HEADERS = {
    "/api/models/some/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "/api/models/some/missing": (401, {"X-Error-Code": "RepoNotFound"}),
}


class FakeHub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.split("?")[0].removesuffix("/revision/main")
        status, headers = HEADERS.get(path, (500, {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(model_id: str, endpoint: str, cache: Path) -> str:
    """What a fresh process says: huggingface_hub reads the environment when it is imported."""
    code = (
        "import sys; from tgi_server.checkpoint.hub import model_folder\n"
        "from tgi_server.errors import StartupError\n"
        "try: print(model_folder(sys.argv[1]))\n"
        "except StartupError as error: print(error)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, model_id], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "a/b/c", "~/nowhere/at-all"])
def test_what_is_neither_folder_nor_hub_id_is_said_so(name: str) -> None:
    with pytest.raises(StartupError, match="no such folder"):
        model_folder(name)


def test_a_gated_model_says_how_to_get_it(hub: str, tmp_path: Path) -> None:
    assert "some/gated is gated" in ask("some/gated", hub, tmp_path)


def test_a_missing_model_says_to_check_the_spelling(hub: str, tmp_path: Path) -> None:
    assert "some/missing is not on the Hub, or is private" in ask("some/missing", hub, tmp_path)


def test_a_hub_that_cannot_be_reached_says_to_check_the_network(tmp_path: Path) -> None:
    answer = ask("some/model", "http://127.0.0.1:9", tmp_path)
    assert "could not be downloaded" in answer and "give a local folder" in answer
