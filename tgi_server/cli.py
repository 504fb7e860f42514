"""`tgi-server` and `text-generation-launcher`: the only place that reads the command line and the environment."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from tgi_server.errors import StartupError
from tgi_server.options import add_flags, resolve

_EPILOG = (
    "Every option may also be given as an environment variable (--max-total-tokens as MAX_TOTAL_TOKENS) and in the "
    "file that --config names (max-total-tokens: 4096); the command line comes first, the file last."
)


def main(argv: Sequence[str] | None = None) -> int:
    """`tgi-server`: listens on 127.0.0.1 unless told otherwise."""
    parser = argparse.ArgumentParser(prog="tgi-server", description="A server for text generation.")
    parser.add_argument("--version", action="version", version=f"tgi-server {_version('tgi-server')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP", description="Serve a model over HTTP.", epilog=_EPILOG
    )
    serve.usage = "tgi-server serve [MODEL] [OPTION ...]"
    serve.add_argument("given_model", nargs="?", metavar="MODEL", help="same as --model-id")
    add_flags(serve, launcher=False)
    return _serve("tgi-server", vars(parser.parse_args(argv)), launcher=False)


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
    return _serve("text-generation-launcher", vars(parser.parse_args(argv)), launcher=True)


def _serve(program: str, given: dict[str, object], *, launcher: bool) -> int:
    model = given.pop("given_model", None)
    if model is not None:
        given.setdefault("model_id", model)
    try:
        values, warnings = resolve(given, os.environ, launcher=launcher)
        if values["env"]:
            print(_environment_report(), flush=True)
        _prepare(values)
        # What serving needs is imported here, so that --help and a mistyped option answer at once.
        from tgi_server.service import serve  # noqa: PLC0415

        return serve(values, warnings)
    except StartupError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def _prepare(values: Mapping[str, object]) -> None:
    cache = values["huggingface_hub_cache"]
    if cache:
        os.environ["HF_HUB_CACHE"] = str(cache)  # the Hub's library reads it when it is imported
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
