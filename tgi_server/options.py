"""The values of all options: from the command line, else the environment, else a file, else the table."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tgi_server.errors import StartupError
from tgi_server.flags import FLAGS, GROUPS, Effect, Flag

log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser, *, launcher: bool) -> None:
    """Every flag of the table, by group. What is not given stays out of the namespace."""
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for flag in FLAGS:
            if flag.group == title:
                _add(group, flag, default_of(flag, launcher=launcher))


def default_of(flag: Flag, *, launcher: bool) -> object:
    return flag.launcher_default if launcher and flag.launcher_default is not None else flag.default


def resolve(
    given: Mapping[str, object], environment: Mapping[str, str], *, launcher: bool
) -> tuple[dict[str, object], list[str]]:
    """Values by `Flag.key`, and lines of warning.

    given: what the command line said, unparsed strings, or lists of them for a flag that repeats.
    Raises StartupError naming the option or variable for a value that is wrong or refused.
    """
    warnings: list[str] = []
    from_environment = {flag.key: _from_environment(flag, environment, warnings) for flag in FLAGS}
    file = given.get("config") or from_environment["config"]
    from_file = _read_file(Path(str(file))) if file else {}
    values: dict[str, object] = {}
    for flag in FLAGS:
        found = default_of(flag, launcher=launcher)
        variable = next((name for name in flag.variables if environment.get(name)), "")
        for source, where in (
            (given, f"--{flag.name}"),
            (from_environment, f"environment variable {variable}"),
            (from_file, f"{file}: {flag.name}"),
        ):
            if source.get(flag.key) is not None:
                found = _parse(flag, source[flag.key], where)
                _check_effect(flag, source[flag.key], where, warnings)
                break
        values[flag.key] = found
    return values, warnings


def _add(group: argparse._ArgumentGroup, flag: Flag, default: object) -> None:
    names = [f"--{flag.name}", *(name if name.startswith("-") else f"--{name}" for name in flag.others)]
    shown = (
        ""
        if default in (None, (), False)
        else f" [{default if isinstance(default, (str, int, float)) else '*'}]"
    )
    help_text = f"{flag.help}{shown}".replace("%", "%%")
    if flag.is_switch:
        group.add_argument(
            *names,
            dest=flag.key,
            nargs="?",
            const="true",
            default=argparse.SUPPRESS,
            help=help_text,
            metavar="BOOL",
        )
    elif flag.repeats:
        group.add_argument(
            *names, dest=flag.key, action="append", default=argparse.SUPPRESS, help=help_text, metavar="TEXT"
        )
    else:
        group.add_argument(*names, dest=flag.key, default=argparse.SUPPRESS, help=help_text, metavar="VALUE")


def _from_environment(flag: Flag, environment: Mapping[str, str], warnings: list[str]) -> object:
    """What the environment says; a flag that repeats is split at commas."""
    for name in flag.variables:
        text = environment.get(name, "")
        if not text:
            continue
        if flag.good is not None:
            try:
                flag.good(text)
            except argparse.ArgumentTypeError as error:
                warnings.append(f"environment variable {name} is ignored: {error}")
                continue
        return [part.strip() for part in text.split(",")] if flag.repeats else text
    return None


def _parse(flag: Flag, value: object, where: str) -> object:
    try:
        if flag.repeats:
            parts = value if isinstance(value, (list, tuple)) else [value]
            return tuple(flag.parse(str(part)) for part in parts)
        return flag.parse(_text(value))
    except argparse.ArgumentTypeError as error:
        raise StartupError(f"{where}: {error}") from None


def _check_effect(flag: Flag, value: object, where: str, warnings: list[str]) -> None:
    if flag.effect is Effect.IGNORED:
        warnings.append(f"{where} changes nothing: {flag.help}")
    elif flag.effect is Effect.REFUSED and _text(value).lower() not in flag.neutral:
        raise StartupError(f"{where} {_text(value)} is not supported: {flag.help}")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_file(path: Path) -> dict[str, object]:
    """A YAML object whose keys are flags, with dashes or underscores, under any of their names."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartupError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise StartupError(f"--config {path} holds no object of options")
    known = {name.replace("-", "_"): flag for flag in FLAGS for name in (flag.name, *flag.others)}
    values: dict[str, object] = {}
    for key, value in content.items():
        flag = known.get(str(key).replace("-", "_"))
        if flag is None:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, 1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise StartupError(f"--config {path}: there is no option {key!r}{hint}")
        values[flag.key] = value
    return values


def keys_of(values: Sequence[str], file: object) -> tuple[str, ...]:
    """Keys given and those of a file, one a line. Raises StartupError for a file without any."""
    if not file:
        return tuple(values)
    path = Path(str(file))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--api-key-file {path} cannot be read: {error}") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise StartupError(f"--api-key-file {path} holds no key; a server without keys needs no such file")
    return (*values, *found)
