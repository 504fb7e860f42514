"""A Hub that refuses, stalls and breaks off: row 112 of `docs/faults.md`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fake_hub import (
    WEIGHTS,
    Hub,
    download,
    ended,
    environment,
    etag_of,
    is_whole,
    running_hub,
    snapshot,
)
from tests.faults.machine import in_namespace
from tgi_server.checkpoint.verify import verify


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.mark.parametrize(
    ("owner", "advice"),
    [
        ("gated", "gated/model is gated: accept its conditions on the Hub, then give a token"),
        ("private", "not on the Hub, or is private: check the spelling, or give a token in HF_TOKEN"),
        ("gone", "not on the Hub, or is private: check the spelling"),
        ("busy", "the Hub answers 429, too many requests; wait some minutes"),
        ("broken", "the Hub answers 500; try again later"),
        ("down", "the Hub answers 503; try again later"),
    ],
)
def test_a_refusal_says_what_to_do(hub: Hub, tmp_path: Path, owner: str, advice: str) -> None:
    status, _, error = ended(download(hub, f"{owner}/model", tmp_path))
    assert status == 2
    assert advice in error
    assert "Traceback" not in error


def test_the_token_goes_to_the_hub_and_is_not_shown(hub: Hub, tmp_path: Path) -> None:
    status, out, error = ended(download(hub, "gated/model", tmp_path, HF_TOKEN="hf_secretsecret"))
    assert status == 2
    assert "Bearer hf_secretsecret" in hub.tokens
    assert "secret" not in out + error


@pytest.mark.parametrize("owner", ["cut", "stalled"])
def test_a_download_that_cannot_be_completed_says_so(hub: Hub, tmp_path: Path, owner: str) -> None:
    status, _, error = ended(download(hub, f"{owner}/model", tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1"))
    assert status == 2
    assert f"{owner}/model could not be downloaded" in error
    assert "files that are complete are kept" in error
    assert "Traceback" not in error


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.ranges.clear()
    status, out, _ = ended(download(hub, "once-cut/model", tmp_path))
    assert status == 0
    assert Path(out) == snapshot(tmp_path, "once-cut/model")
    assert is_whole(Path(out))
    assert hub.ranges == ["bytes=10485760-"]


def begun(hub: Hub, owner: str, cache: Path) -> subprocess.Popen[str]:
    """A download of which a part has come."""
    hub.sent[owner] = 0
    process = download(hub, f"{owner}/model", cache)
    deadline = time.monotonic() + 30
    while hub.sent[owner] < len(WEIGHTS) // 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert 0 < hub.sent[owner] < len(WEIGHTS)
    return process


def test_a_download_that_was_killed_leaves_nothing_that_passes_for_a_file(hub: Hub, tmp_path: Path) -> None:
    process = begun(hub, "slow", tmp_path)
    process.kill()
    process.wait()
    assert not (snapshot(tmp_path, "slow/model") / "model.safetensors").exists()
    status, out, _ = ended(download(hub, "slow/model", tmp_path))
    assert status == 0
    assert is_whole(Path(out))


def test_a_download_that_is_told_to_stop_does(hub: Hub, tmp_path: Path) -> None:
    for send, expected in ((subprocess.Popen.terminate, 143), (lambda process: process.send_signal(2), 130)):
        process = begun(hub, "slow", tmp_path)
        send(process)
        status, _, error = ended(process, 10)
        assert status == expected
        assert "Traceback" not in error


def test_two_processes_fetch_a_file_into_one_cache_once(hub: Hub, tmp_path: Path) -> None:
    hub.sent.pop("slow", None)
    both = [download(hub, "slow/model", tmp_path) for _ in range(2)]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert is_whole(snapshot(tmp_path, "slow/model"))
    assert hub.sent["slow"] == len(WEIGHTS)


def test_without_the_hub_a_model_that_is_cached_is_found(hub: Hub, tmp_path: Path) -> None:
    assert ended(download(hub, "fine/model", tmp_path))[0] == 0
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        status, out, _ = ended(download(hub, "fine/model", tmp_path, **more))
        assert status == 0
        assert is_whole(Path(out))


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to fetch it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network"),
    ],
)
def test_without_the_hub_a_model_that_is_not_cached_is_refused(
    hub: Hub, tmp_path: Path, more: dict[str, str], advice: str
) -> None:
    status, _, error = ended(download(hub, "never/model", tmp_path, **more))
    assert status == 2
    assert advice in error


def test_what_was_fetched_can_be_verified(hub: Hub, tmp_path: Path) -> None:
    assert ended(download(hub, "fine/model", tmp_path))[0] == 0
    folder = snapshot(tmp_path, "fine/model")
    blob = (folder / "model.safetensors").resolve()
    assert blob.name == etag_of("model.safetensors")
    done = verify(folder, 2)
    assert (done.files, done.unknown) == (3, ())


def test_a_disk_that_is_full_is_named_and_the_cache_stays_whole(hub: Hub, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    prefix = in_namespace(f"mount -t tmpfs -o size=4m none {full}")
    command = [*prefix, sys.executable, "-m", "tgi_server.cli", "download", "fine/model"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(hub, full), check=False, timeout=60
    )
    assert done.returncode == 2
    assert "could not be stored" in done.stderr and "No space left on device" in done.stderr
    assert "--huggingface-hub-cache" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_that_may_not_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, error = ended(download(hub, "fine/model", tmp_path / "file"))
    assert status == 2
    assert "could not be stored" in error and str(tmp_path / "file") in error


def test_the_notes_of_a_fetched_model_are_json(hub: Hub, tmp_path: Path) -> None:
    assert ended(download(hub, "fine/model", tmp_path))[0] == 0
    assert json.loads((snapshot(tmp_path, "fine/model") / "config.json").read_text())["model_type"] == "llama"
