"""`tgi-server` and `text-generation-launcher`: the only place that reads the command line and the environment."""

from __future__ import annotations

import argparse
import difflib
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NoReturn

from tgi_server.bench.options import add_options
from tgi_server.completion import COMMANDS, SCRIPTS
from tgi_server.errors import StartupError
from tgi_server.flags import memory_size
from tgi_server.options import add_flags, resolve
from tgi_server.quantize.arguments import add_eval, add_quantize

Values = Mapping[str, object]
# What the command line said, the values of all options, lines of warning; the exit status.
Command = Callable[[Values, Values, Sequence[str]], int]

_EPILOG = (
    "Every option may also be given as an environment variable (--max-total-tokens as MAX_TOTAL_TOKENS) and in the "
    "file that --config names (max-total-tokens: 4096); the command line comes first, the file last."
)


def main(argv: Sequence[str] | None = None) -> int:
    """`tgi-server`: listens on 127.0.0.1 unless told otherwise."""
    parser = argparse.ArgumentParser(prog="tgi-server", description="A server for text generation.")
    parser.add_argument("--version", action="version", version=f"tgi-server {_version('tgi-server')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    parsers = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, text in COMMANDS.items()
    }
    for name in ("serve", "plan", "bench", "download"):
        parsers[name].epilog = _EPILOG
        parsers[name].usage = f"tgi-server {name} [MODEL] [OPTION ...]"
        parsers[name].add_argument("given_model", nargs="?", metavar="MODEL", help="same as --model-id")
        add_flags(parsers[name], launcher=False)
    parsers["plan"].add_argument(
        "--device-memory", type=memory_size, metavar="SIZE",
        help="memory of a GPU that need not be here, such as 80GiB; by default what is free here. "
        "The exit status is 1 if one device is not enough",
    )  # fmt: skip
    add_options(parsers["bench"])
    parsers["completion"].add_argument("shell", choices=sorted(SCRIPTS))
    add_quantize(parsers["quantize"])
    add_eval(parsers["eval"])
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(parsers[arguments.command], unknown)
    if arguments.command in ("quantize", "eval"):
        return _on_weights("tgi-server", arguments)
    given = vars(arguments)
    command = given.pop("command")
    if command == "completion":
        print(SCRIPTS[given["shell"]](), end="")
        return 0
    return _run("tgi-server", _COMMANDS[command], given, launcher=False)


def launcher(argv: Sequence[str] | None = None) -> int:
    """`text-generation-launcher`: TGI's command, with its flags and its defaults."""
    parser = argparse.ArgumentParser(
        prog="text-generation-launcher",
        description="tgi-server under the name and with the defaults of TGI's launcher.",
        epilog=_EPILOG,
        usage="text-generation-launcher [OPTION ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--version", "-V", action="version", version=f"tgi-server {_version('tgi-server')}")
    add_flags(parser, launcher=True)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(parser, unknown)
    return _run("text-generation-launcher", _serve, vars(arguments), launcher=True)


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with status 2, naming what was mistyped and what was perhaps meant."""
    typed = unknown[0].partition("=")[0]
    options = re.findall(r"--[a-z][a-z0-9-]*", parser.format_help())
    near = difflib.get_close_matches(typed, set(options), n=3, cutoff=0.75)
    hint = f"; similar: {', '.join(near)}" if near else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _run(program: str, command: Command, given: dict[str, object], *, launcher: bool) -> int:
    model = given.pop("given_model", None)
    if model is not None:
        given.setdefault("model_id", model)
    try:
        values, warnings = resolve(given, os.environ, launcher=launcher)
        if values["env"]:
            print(_environment_report(), flush=True)
        _prepare(values)
        extra = {name: os.environ.get(name.upper()) for name in ("cuda_visible_devices",)}
        status = command(given, {**values, **extra}, warnings)
        sys.stdout.flush()
        return status
    except StartupError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read the output has enough, as `head` has. Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _on_weights(program: str, arguments: argparse.Namespace) -> int:
    from tgi_server.quantize.command import run_eval, run_quantize  # noqa: PLC0415

    try:
        (run_quantize if arguments.command == "quantize" else run_eval)(arguments)
    except StartupError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


# What a command needs is imported in it, so that --help and a mistyped option answer at once.
def _serve(_given: Values, values: Values, warnings: Sequence[str]) -> int:
    from tgi_server.listening import take_addresses  # noqa: PLC0415

    _require_model(values)
    ports = (values["port"], values["prometheus_port"])
    port, metrics_port = (value if isinstance(value, int) else None for value in ports)
    addresses = take_addresses(str(values["host"]), port or 0, metrics_port)
    from tgi_server.service import serve  # noqa: PLC0415

    with _ended_by_signals():
        return serve(values, warnings, addresses)


def _plan(given: Values, values: Values, _warnings: Sequence[str]) -> int:
    from tgi_server import start_times  # noqa: PLC0415
    from tgi_server.configure import memory_plans  # noqa: PLC0415
    from tgi_server.memory_plan import advice, table  # noqa: PLC0415

    _require_model(values)
    size = given.get("device_memory")
    plans = memory_plans(values, size if isinstance(size, int) else None)
    print(table(plans))
    print(start_times.lines(plans))
    lines = advice(plans)
    if lines:
        print("", *lines, sep="\n")
    return 0 if plans[0].fits else 1


def _bench(given: Values, values: Values, _warnings: Sequence[str]) -> int:
    from tgi_server.bench.command import bench  # noqa: PLC0415

    return bench(given, values)


def _download(_given: Values, values: Values, _warnings: Sequence[str]) -> int:
    from tgi_server.checkpoint.hub import model_folder  # noqa: PLC0415

    _require_model(values)
    revision = values["revision"]
    with _ended_by_signals():
        print(model_folder(str(values["model_id"]), str(revision) if revision else None))
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While a model is fetched: the Hub's threads would be waited for, which may take an hour.

    Process 1 of a container is deaf to signals without a handler; a service that runs has handlers of its own.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _frame: os._exit(128 + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


_COMMANDS: Mapping[str, Command] = {
    "serve": _serve,
    "plan": _plan,
    "bench": _bench,
    "download": _download,
}


def _prepare(values: Values) -> None:
    cache = values["huggingface_hub_cache"]
    if cache:
        os.environ["HF_HUB_CACHE"] = str(cache)  # the Hub's library reads it when it is imported


def _require_model(values: Values) -> None:
    if not values["model_id"]:
        raise StartupError("which model? Give a folder or a Hub id as --model-id")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _environment_report() -> str:
    """What a bug report should say of the machine; no variables, they may hold secrets."""
    packages = (
        "tgi-server",
        "torch",
        "tokenizers",
        "aiohttp",
        "msgspec",
        "uvloop",
        "jinja2",
        "huggingface-hub",
    )
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    return "\n".join([*lines, *(f"{package} {_version(package)}" for package in packages)])


if __name__ == "__main__":
    sys.exit(main())
