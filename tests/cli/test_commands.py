"""The commands beside `serve`: what they print, and what they do without."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import DEMO
from tests.text.tiny import write_tiny_folder
from tgi_server import cli
from tgi_server.completion import COMMANDS, OWN, SCRIPTS
from tgi_server.flags import FLAGS, Effect
from tgi_server.options import default_of

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
WORKING = [flag.name for flag in FLAGS if flag.effect is Effect.WORKS]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that ends by itself writes to standard output, white space folded."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    assert status == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_every_command_and_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert list(COMMANDS) == ["serve", "plan", "bench", "download", "quantize", "eval", "completion"]
    for name, purpose in COMMANDS.items():
        assert f"{name} {purpose}" in text


@pytest.mark.parametrize("command", ["serve", "plan", "bench", "download"])
def test_help_of_a_command_has_each_option_with_its_text_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    text = printed(capsys, command, "--help")
    assert text.startswith(f"usage: tgi-server {command} [MODEL] [OPTION ...]")
    assert "None" not in text and "SUPPRESS" not in text
    for flag in FLAGS:
        default = default_of(flag, launcher=False)
        shown = f" [{default}]" if isinstance(default, (str, int, float)) and default is not False else ""
        assert f"--{flag.name}" in text
        assert f"{flag.help}{shown}" in text, flag.name


def test_help_of_the_port_reads_like_this(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, "serve", "--help")
    assert "--port VALUE, -p VALUE port to listen on; 0 takes any free one [3000]" in text.replace(
        "--port, -p VALUE",
        "--port VALUE, -p VALUE",  # Python 3.13 says it shorter
    )


def test_shells_are_told_of_every_option_that_is_of_one_command_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    for command in ("plan", "bench", "serve"):
        named = set(re.findall(r"--([a-z][a-z-]+)", printed(capsys, command, "--help").split("options:")[1]))
        of_all = {name for flag in FLAGS for name in (flag.name, *flag.others)} | {"help"}
        mentioned = {name for name in named if name not in of_all}
        assert set(OWN.get(command, ())) <= mentioned
        assert mentioned <= set(OWN.get(command, ())) | {"config"}


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version").startswith("tgi-server ")


@pytest.mark.parametrize("command", [["plan"], ["download"], ["completion", "bash"]])
def test_the_other_commands_do_without_torch_and_http(tmp_path: Path, command: list[str]) -> None:
    folder = write_tiny_folder(tmp_path)
    arguments = command if len(command) > 1 else [*command, "--model-id", str(folder)]
    code = (
        "import sys\nfrom tgi_server import cli\nassert cli.main(sys.argv[1:]) == 0\n"
        "loaded = {'torch', 'aiohttp', 'tokenizers', 'uvloop'} & set(sys.modules)\nassert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_revision_of_a_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("serve", "plan", "download"):
        assert cli.main([command, str(write_tiny_folder(tmp_path)), "--revision", "v1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no revision v1; leave --revision out" in error


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((write_tiny_folder(tmp_path) / "config.json").read_text())
    config |= {"num_hidden_layers": 1000, "hidden_size": 65536, "intermediate_size": 262144}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["serve", str(tmp_path), "--device", "cpu"]) == 2
    assert "of memory are usable; free some, or choose a smaller model" in capsys.readouterr().err


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_completion_offers_commands_and_options_that_work(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    dashes = "-l " if shell == "fish" else "--"
    assert all(f"{dashes}{name}" in script for name in WORKING)
    assert all(name in script for name in COMMANDS)
    assert "lora-adapters" not in script and "ngrok" not in script
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed: its script is not parsed")
    subprocess.run([program, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tgi-server", "pl"], "plan"),
        (["tgi-server", "serve", "--max-que"], "--max-queue"),
        (["tgi-server", "bench", "--batch-s"], "--batch-size"),
        (["tgi-server", "bench", "--max-que"], "--max-queue"),
        (["tgi-server", "serve", "--batch-s"], ""),
        (["tgi-server", "plan", "--device-m"], "--device-memory"),
        (["text-generation-launcher", "--json"], "--json-output"),
    ],
)
def test_bash_completes_what_was_begun(words: list[str], offered: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    script = (
        f"{SCRIPTS['bash']()}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
        f'_tgi_server {words[0]}\necho "${{COMPREPLY[*]}}"'
    )
    done = subprocess.run([bash], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == f"{offered}\n"


def test_the_pages_name_no_option_that_there_is_not() -> None:
    known = {name for flag in FLAGS for name in (flag.name, *flag.others)}
    known |= {"help", "version", "device-memory", "user", "url", "json"}  # of the commands, and docker's
    known |= {"batch-size", "sequence-length", "decode-length", "runs", "warmups"}
    for page in ("operations.md", "migrating-from-tgi.md"):
        named = set(re.findall(r"--([a-z][a-z-]+)", (DOCS / page).read_text(encoding="utf-8")))
        assert named and named <= known, f"{page}: {named - known}"


def test_what_the_migration_page_calls_refused_is() -> None:
    page = (DOCS / "migrating-from-tgi.md").read_text(encoding="utf-8").split("## Refused, and why")
    effects = {name: flag.effect for flag in FLAGS for name in (flag.name, *flag.others)}
    first_cells = [line.split("|")[1] for line in page[1].splitlines() if line.startswith("|")]
    refused = {name for cell in first_cells for name in re.findall(r"--([a-z][a-z-]+)", cell)}
    assert len(refused) >= 7
    assert all(effects[name] is Effect.REFUSED for name in refused)
    (accepted,) = [line for line in page[0].splitlines() if "accepted; one warning" in line]
    ignored = re.findall(r"--([a-z][a-z-]+)", accepted)
    assert len(ignored) >= 9
    assert all(effects[name] is Effect.IGNORED for name in ignored)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["serve", "m", "--prot", "1"],
            "tgi-server serve: error: unrecognized arguments: --prot 1; similar: --port",
        ),
        (["plan", "m", "--devise-memory=80GiB"], "--devise-memory=80GiB; similar: --device-memory"),
        (["bench", "m", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_a_mistyped_option_is_named_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    error = capsys.readouterr().err
    assert said in error and "usage: tgi-server " + arguments[0] in error


def test_a_reader_who_has_enough_ends_a_command_without_a_complaint() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tgi_server.cli", "plan", str(DEMO), "--device-memory", "80GiB"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
