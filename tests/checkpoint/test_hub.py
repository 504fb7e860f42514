"""What a user calls a model, and what is said when there is none. A fake Hub answers where one is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.checkpoint.tiny_gguf import random_llama, weights_of, write_gguf
from tgi_server.checkpoint.gguf_folder import DESCRIPTION, LINK
from tgi_server.checkpoint.hub import model_folder
from tgi_server.errors import StartupError

HEADERS = {
    "/api/models/some/gated/revision/main": (403, {"X-Error-Code": "GatedRepo"}),
    "/api/models/some/missing/revision/main": (401, {"X-Error-Code": "RepoNotFound"}),
    "/api/models/some/model/revision/v9": (404, {"X-Error-Code": "RevisionNotFound"}),
}
COMMIT = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"the same",
    "x.bin": b"",
}


GGUF_FILES = {
    "some/gguf": {"README.md": b"about", "tiny.gguf": b""},
    "some/many": {"tiny-Q4_0.gguf": b"", "tiny-Q8_0.gguf": b"", "config.json": b"{}"},
}


class FakeHub(BaseHTTPRequestHandler):
    """Errors as in HEADERS; `some/model` has a revision v1 with FILES, GGUF_FILES are of main and `tiny` each."""

    tiny = b""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        status, headers = HEADERS.get(path, (500, {}))
        body = b""
        model_id = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        name = path.rsplit("/", 1)[1]
        files = {
            n: self.tiny if n.endswith(".gguf") else b for n, b in GGUF_FILES.get(model_id, FILES).items()
        }
        revision = "v1" if model_id == "some/model" else "main"
        if model_id not in {"some/model", *GGUF_FILES}:
            pass
        elif path == f"/api/models/{model_id}/revision/{revision}" or (
            path == f"/api/models/{model_id}" and revision == "main"
        ):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": model_id, "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/api/models/{model_id}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            body = json.dumps(tree).encode()
        elif path.startswith((f"/{model_id}/resolve/{COMMIT}/", f"/{model_id}/resolve/main/")):
            body = files.get(name, b"")
            status = 200 if body else 404
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            if not body:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        self.send_response(200 if body else status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, weights_of(random_llama(tied=True)))
    FakeHub.tiny = path.read_bytes()
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def environment(endpoint: str, cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def ask(model_id: str, endpoint: str, cache: Path, revision: str | None = None) -> str:
    """What a fresh process says: huggingface_hub reads the environment when it is imported."""
    code = (
        "import sys; from tgi_server.checkpoint.hub import model_folder\n"
        "from tgi_server.errors import StartupError\n"
        "try: print(model_folder(*sys.argv[1:]))\n"
        "except StartupError as error: print(error)"
    )
    arguments = [model_id, *([revision] if revision else [])]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=environment(endpoint, cache), check=True,
    )  # fmt: skip
    return done.stdout


def download(endpoint: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process that may not import torch."""
    code = (
        "import sys; from tgi_server import cli\n"
        "status = cli.main(['download', *sys.argv[1:]])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=environment(endpoint, cache), check=False,
    )  # fmt: skip


def test_a_repository_of_one_gguf_file_is_that_file_described(hub: str, tmp_path: Path) -> None:
    folder = Path(ask("some/gguf", hub, tmp_path).strip())
    assert folder.name.startswith("tiny-")
    assert sorted(path.name for path in folder.iterdir()) == sorted((*DESCRIPTION, LINK))
    assert (folder / LINK).read_bytes() == FakeHub.tiny
    assert Path(ask("some/gguf", "http://127.0.0.1:9", tmp_path).strip()) == folder, "it is cached"


def test_a_repository_of_several_gguf_files_names_them(hub: str, tmp_path: Path) -> None:
    several = (
        "some/many holds 2 GGUF files: tiny-Q4_0.gguf, tiny-Q8_0.gguf. "
        "Name the one to serve: some/many/tiny-Q4_0.gguf"
    )
    assert ask("some/many", hub, tmp_path).strip() == several
    assert "tiny-Q8_0-" in ask("some/many/tiny-Q8_0.gguf", hub, tmp_path)
    assert ask("some/many", hub, tmp_path).strip() == several, "though one is cached"
    assert "has no such file" in ask("some/many/tiny-Q2_K.gguf", hub, tmp_path)


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


def test_a_revision_that_is_not_there_is_named(hub: str, tmp_path: Path) -> None:
    assert ask("some/model", hub, tmp_path, "v9").startswith("some/model has no revision v9: give a branch")


def test_a_local_folder_has_no_revisions_but_its_own(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path), "main") == tmp_path
    with pytest.raises(StartupError, match="has no revision v1; leave --revision out"):
        model_folder(str(tmp_path), "v1")


def test_a_name_that_no_hub_can_have_is_said_so() -> None:
    with pytest.raises(StartupError, match="owner/-- is no Hub id"):
        model_folder("owner/--")


def test_the_download_command_prints_the_folder_of_the_revision(hub: str, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "--model-id", "some/model", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = download("http://127.0.0.1:9", tmp_path, "some/model", "--revision", "v1")
    assert again.stdout == done.stdout, "what is cached needs no network"


def test_a_plan_fetches_the_config_alone(hub: str, tmp_path: Path) -> None:
    code = "from tgi_server.checkpoint.hub import model_folder as f; print(f('some/model', 'v1', only_config=True))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment(hub, tmp_path), check=True,
    )  # fmt: skip
    assert [path.name for path in Path(done.stdout.strip()).iterdir()] == ["config.json"]


def test_the_download_command_says_in_one_line_what_is_wrong(hub: str, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "some/gated")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("tgi-server: some/gated is gated: accept")


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_network(hub: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = download(hub, tmp_path / "file", "some/model", "--revision", "v1")
    assert done.returncode == 2
    assert "could not be stored: [Errno 20] Not a directory" in done.stderr
