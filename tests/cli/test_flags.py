"""The command line: one table, and everything in it does what it says."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

from tgi_server import cli
from tgi_server.errors import StartupError
from tgi_server.flags import FLAGS, GROUPS, Effect, Flag
from tgi_server.options import add_flags, default_of, keys_of, resolve

# Every flag of TGI 3.3's launcher and router.
OF_TGI = [
    "model-id",
    "revision",
    "validation-workers",
    "sharded",
    "num-shard",
    "quantize",
    "speculate",
    "dtype",
    "kv-cache-dtype",
    "trust-remote-code",
    "max-concurrent-requests",
    "max-best-of",
    "max-stop-sequences",
    "max-top-n-tokens",
    "max-input-tokens",
    "max-input-length",
    "max-total-tokens",
    "waiting-served-ratio",
    "max-batch-prefill-tokens",
    "max-batch-total-tokens",
    "max-waiting-tokens",
    "max-batch-size",
    "cuda-graphs",
    "hostname",
    "port",
    "prometheus-port",
    "shard-uds-path",
    "master-addr",
    "master-port",
    "huggingface-hub-cache",
    "weights-cache-override",
    "disable-custom-kernels",
    "cuda-memory-fraction",
    "rope-scaling",
    "rope-factor",
    "json-output",
    "otlp-endpoint",
    "otlp-service-name",
    "cors-allow-origin",
    "api-key",
    "watermark-gamma",
    "watermark-delta",
    "ngrok",
    "ngrok-authtoken",
    "ngrok-edge",
    "tokenizer-config-path",
    "disable-grammar-support",
    "env",
    "max-client-batch-size",
    "lora-adapters",
    "usage-stats",
    "payload-limit",
    "enable-prefill-logprobs",
    "graceful-termination-timeout",
    "max-image-fetch-size",
]

OF_VLLM = [
    "model",
    "served-model-name",
    "host",
    "port",
    "max-model-len",
    "max-num-seqs",
    "max-num-batched-tokens",
    "tensor-parallel-size",
    "gpu-memory-utilization",
    "dtype",
    "quantization",
    "kv-cache-dtype",
    "trust-remote-code",
    "api-key",
    "chat-template",
    "generation-config",
    "ssl-certfile",
    "ssl-keyfile",
    "allowed-origins",
    "download-dir",
    "load-format",
    "revision",
]

BY_NAME = {name: flag for flag in FLAGS for name in (flag.name, *flag.others)}


def parse(*arguments: str, launcher: bool = False, **environment: str) -> tuple[dict[str, object], list[str]]:
    parser = argparse.ArgumentParser()
    add_flags(parser, launcher=launcher)
    return resolve(vars(parser.parse_args(arguments)), environment, launcher=launcher)


def a_value(flag: Flag) -> str:
    """Something the flag accepts that is not its default."""
    for text in (
        ("0.0.0.0",)
        if flag.name == "host"
        else ("http://127.0.0.1:4317",)
        if flag.name == "otlp-endpoint"
        else (
            "7",
            "77",
            "dummy",
            "cpu",
            "model",
            "debug",
            "0.5",
            "0.0.0.0",
            "true",
            "avx2",
            "float16",
            "fp8",
            "text",
        )
    ):
        try:
            if flag.parse(text) != flag.default:
                return text
        except argparse.ArgumentTypeError:
            continue
    raise AssertionError(f"no value for --{flag.name}")


def test_no_name_stands_for_two_options() -> None:
    names = [name for flag in FLAGS for name in (flag.name, *flag.others)]
    variables = [variable for flag in FLAGS for variable in flag.variables]
    assert len(names) == len(set(names))
    assert len(variables) == len(set(variables))
    assert {flag.group for flag in FLAGS} == set(GROUPS)


@pytest.mark.parametrize("name", [*OF_TGI, *OF_VLLM])
def test_every_name_people_know_is_in_the_table(name: str) -> None:
    assert name in BY_NAME


@pytest.mark.parametrize("name", OF_TGI)
def test_every_flag_of_tgi_is_also_its_environment_variable(name: str) -> None:
    flag = BY_NAME[name]
    expected = name.upper().replace("-", "_")
    assert expected in flag.variables or flag.name == "huggingface-hub-cache"


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_each_option_does_what_the_table_says(flag: Flag, tmp_path: Path) -> None:
    text = a_value(flag)
    if flag.effect is Effect.REFUSED:
        with pytest.raises(StartupError, match=flag.name):
            parse(f"--{flag.name}", text)
        for neutral in flag.neutral:
            assert not parse(f"--{flag.name}", neutral)[1]
        return
    if flag.name == "config":
        return  # names a file, see below
    values, warnings = parse(f"--{flag.name}", text)
    assert values[flag.key] == ((text,) if flag.repeats else flag.parse(text))
    assert len(warnings) == (flag.effect is Effect.IGNORED)
    for variable in flag.variables:
        assert parse(**{variable: text}) == (values, ANY), variable
    file = tmp_path / "options.yaml"
    for name in (flag.name, flag.key, *flag.others):
        file.write_text(f"{name}: {text}\n")
        in_file, warned = parse("--config", str(file))
        assert {**in_file, "config": values["config"]} == values, name
        assert len(warned) == len(warnings), "once, with the reason"
    assert all(flag.help in line for line in warnings)


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.others], ids=lambda flag: flag.name)
def test_other_names_mean_the_same(flag: Flag) -> None:
    if flag.effect is Effect.REFUSED:
        return
    text = a_value(flag)
    for other in flag.others:
        dashed = other if other.startswith("-") else f"--{other}"
        assert parse(dashed, text)[0][flag.key] == parse(f"--{flag.name}", text)[0][flag.key]


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.effect is Effect.WORKS], ids=lambda f: f.name
)
def test_an_option_that_works_is_used_somewhere(flag: Flag) -> None:
    root = Path(cli.__file__).parent
    sources = [(root / name).read_text() for name in ("cli.py", "configure.py", "service.py", "options.py")]
    assert any(f'"{flag.key}"' in source for source in sources)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("max-queue: 1\nmax_sequences: 2\nport: 3\njson-output: true\ncors-allow-origin: [a, b]\n")
    values, _ = parse("--config", str(file), "--max-queue", "10", MAX_QUEUE="20", MAX_SEQUENCES="30")
    assert values["max_queue"] == 10
    assert values["max_sequences"] == 30
    assert values["port"] == 3
    assert values["json_output"] is True
    assert values["cors_allow_origin"] == ("a", "b")
    assert parse(TGI_CONFIG=str(file))[0]["port"] == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max-quee: 1", "did you mean max-queue"),
        ("- a", "no object"),
        ("{", "cannot be read"),
        ("max-queue: many", "max-queue: 'many' is not a whole number"),
        ("lora-adapters: x", "not supported"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(StartupError, match=complaint):
        parse("--config", str(file))


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    for name in ("MAX_QUEUE", "MAX_CONCURRENT_REQUESTS"):
        with pytest.raises(StartupError, match=f"environment variable {name}: 'x' is not a whole number"):
            parse(**{name: "x"})


@pytest.mark.parametrize(
    ("variable", "junk", "good"),
    [("HOSTNAME", "3f2c1a9b8d7e", "0.0.0.0"), ("HOST", "x86_64-conda", "::"), ("ENV", "production", "true")],
)
def test_what_containers_and_shells_put_into_the_environment_is_ignored_with_a_line(
    variable: str, junk: str, good: str
) -> None:
    values, warnings = parse(**{variable: junk})
    assert values == parse()[0]
    assert len(warnings) == 1 and variable in warnings[0]
    assert not parse(**{variable: good})[1]


def test_both_commands_listen_where_their_users_expect() -> None:
    assert parse()[0]["host"] == "127.0.0.1"
    assert parse(launcher=True)[0]["host"] == "0.0.0.0"
    assert parse("--hostname", "::1", launcher=True)[0]["host"] == "::1"
    limits = {name: default_of(BY_NAME[name], launcher=True) for name in OF_TGI}
    assert limits["max-best-of"] == 2
    assert limits["max-stop-sequences"] == 4
    assert limits["max-top-n-tokens"] == 5
    assert limits["max-client-batch-size"] == 4


def test_keys_come_from_flags_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nalice\n\n  bob  \n")
    assert keys_of(("carol",), file) == ("carol", "alice", "bob")
    assert parse("--api-key", "a", "--api-key", "b")[0]["api_key"] == ("a", "b")
    assert parse(API_KEY="a,b")[0]["api_key"] == ("a", "b")
    assert parse(VLLM_API_KEY="a")[0]["api_key"] == ("a",)
    file.write_text("# nobody\n")
    with pytest.raises(StartupError, match="holds no key"):
        keys_of((), file)
    with pytest.raises(StartupError, match="cannot be read"):
        keys_of((), tmp_path / "missing")


@pytest.mark.parametrize(
    "command", [["serve", "--help"], ["--help"], ["--version"], ["serve", "--port", "x"]]
)
def test_questions_and_mistakes_are_answered_without_loading_what_serves(command: list[str]) -> None:
    code = (
        "import sys\nfrom tgi_server import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "loaded = {'torch', 'aiohttp', 'tokenizers', 'uvloop'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)


def test_the_help_of_both_commands_has_every_option_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    for run in (lambda: cli.main(["serve", "--help"]), lambda: cli.launcher(["--help"])):
        with pytest.raises(SystemExit):
            run()
        text = capsys.readouterr().out
        assert all(f"\n{group}:" in text for group in GROUPS)
        assert all(f"--{flag.name}" in text for flag in FLAGS)


def test_a_refused_option_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "somewhere", "--lora-adapters", "one"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("tgi-server: --lora-adapters one is not supported")
    assert line.count("\n") == 1
