"""Shell completion, made from the table of options: what works is offered, what does nothing or is refused is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tgi_server.bench.options import NAMES as OF_BENCH
from tgi_server.flags import FLAGS, Effect, Flag

COMMANDS: Final[Mapping[str, str]] = {
    "serve": "serve a model over HTTP",
    "plan": "show what a model takes of memory, without loading it",
    "bench": "measure prefill and decode at several batch sizes",
    "download": "fetch a model from the Hub",
    "quantize": "write a model with weights of fewer bits",
    "eval": "measure a model, and how far it is from another",
    "completion": "print a script that completes commands and options",
}
_OPTIONS: Final = tuple(flag for flag in FLAGS if flag.effect is Effect.WORKS)
OWN: Final[Mapping[str, tuple[str, ...]]] = {
    "plan": ("device-memory",),
    "bench": OF_BENCH,
}  # of one command alone


def _plain(flag: Flag) -> str:
    """Its help without what shells take for syntax between single quotes, or zsh between brackets."""
    return flag.help.translate({ord("'"): "’", ord("["): "(", ord("]"): ")", ord(":"): ",", ord("\\"): "/"})


def _bash() -> str:
    options = " ".join(f"--{flag.name}" for flag in _OPTIONS)
    own = {name: " ".join(f"--{one}" for one in names) for name, names in OWN.items()}
    cases = " ".join(f"{name}) own='{options}';;" for name, options in own.items())
    return f"""_tgi_server() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" own=
    case "${{COMP_WORDS[1]}}" in {cases} esac
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{options} --help --version $own" -- "$word")
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
    own = {
        name: " ".join(f"'--{one}[of {name}]:value:_files'" for one in names) for name, names in OWN.items()
    }
    cases = " ".join(f"{name}) own=({options});;" for name, options in own.items())
    return f"""#compdef tgi-server text-generation-launcher
_tgi_server() {{
    local -a own
    case $words[2] in {cases} esac
    if [[ $service == tgi-server && $CURRENT == 2 ]]; then
        compadd {" ".join(COMMANDS)}
    else
        _arguments $own {options} '*:model:_files'
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
    own = [
        f"complete -c tgi-server -n '__fish_seen_subcommand_from {name}' -l {one} -r"
        for name, names in OWN.items()
        for one in names
    ]
    return "\n".join([*commands, *options, *own, ""])


SCRIPTS: Final[Mapping[str, Callable[[], str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
