"""Shell completion, made from the table of options: what works is offered, what does nothing or is refused is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tgi_server.flags import FLAGS, Effect, Flag

COMMANDS: Final[Mapping[str, str]] = {
    "serve": "serve a model over HTTP",
    "plan": "show what a model takes of memory, without loading it",
    "bench": "measure prefill and decode at several batch sizes",
    "download": "fetch a model from the Hub",
    "completion": "print a script that completes commands and options",
}
_OPTIONS: Final = tuple(flag for flag in FLAGS if flag.effect is Effect.WORKS)


def _plain(flag: Flag) -> str:
    """Its help without what shells take for syntax between single quotes, or zsh between brackets."""
    return flag.help.translate({ord("'"): "’", ord("["): "(", ord("]"): ")", ord(":"): ",", ord("\\"): "/"})


def _bash() -> str:
    options = " ".join(f"--{flag.name}" for flag in _OPTIONS)
    return f"""_tgi_server() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{options} --help --version" -- "$word")
    elif [[ $COMP_CWORD == 1 && $1 == *tgi-server ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{" ".join(COMMANDS)}" -- "$word")
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
    fi
}}
complete -o filenames -F _tgi_server tgi-server text-generation-launcher
"""


def _zsh() -> str:
    ends = ("]:value:_files'", "]'")
    options = " ".join(f"'--{flag.name}[{_plain(flag)}{ends[flag.is_switch]}" for flag in _OPTIONS)
    return f"""#compdef tgi-server text-generation-launcher
_tgi_server() {{
    if [[ $service == tgi-server && $CURRENT == 2 ]]; then
        compadd {" ".join(COMMANDS)}
    else
        _arguments {options} '*:model:_files'
    fi
}}
compdef _tgi_server tgi-server text-generation-launcher
"""


def _fish() -> str:
    first = "complete -c tgi-server -n __fish_use_subcommand"
    commands = [f"{first} -f -a {name} -d '{text}'" for name, text in COMMANDS.items()]
    options = [
        f"complete -c {command} -l {flag.name} -d '{_plain(flag)}'{'' if flag.is_switch else ' -r'}"
        for command in ("tgi-server", "text-generation-launcher")
        for flag in _OPTIONS
    ]
    return "\n".join([*commands, *options, ""])


SCRIPTS: Final[Mapping[str, Callable[[], str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
