"""The arguments of `tgi-server quantize` and `tgi-server eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tgi_server.errors import StartupError


@dataclass(frozen=True)
class Kind:
    """A method as the command line knows it; what it does is in `tgi_server.quantize.methods`."""

    help: str
    takes: Mapping[str, object]  # those of OPTIONS that mean something to it, and their defaults
    needs_text: bool = True  # if it takes samples: whether none of them will not do


OPTIONS: Final = ("bits", "group_size", "asymmetric", "desc_act", "samples")  # not for every method
_GRID: Final = {"bits": 4, "group_size": 128, "asymmetric": False}
_STATISTICS: Final = {"samples": 128}
METHODS: Final[Mapping[str, Kind]] = {
    "gptq": Kind(
        "GPTQ: by what the calibration text shows of the inputs", _GRID | _STATISTICS | {"desc_act": False}
    ),
    "awq": Kind(
        "AWQ: columns with large inputs are scaled up, then codes as by gptq",
        _STATISTICS | {"bits": 4, "group_size": 128},
    ),
    "nearest": Kind("plain rounding, in GPTQ's layout", _GRID),
    "nf4": Kind(
        "bitsandbytes' NF4 with double quantisation, 4.13 bits a weight, by GPTQ's way", {"samples": 128}
    ),
    "int8": Kind("bitsandbytes' LLM.int8: a scale for each row", {}),
    "fp8": Kind(
        "float8 (e4m3) by GPTQ's way (0 samples: by plain rounding), a scale a row, in compressed-tensors' layout",
        {"samples": 32},
        needs_text=False,
    ),
    "w8a8": Kind(
        "8 bits, a scale a row, in compressed-tensors' layout, by GPTQ's way, activations in 8 bits too; columns are "
        "scaled so that both lose little (0 samples: plain rounding)",
        {"samples": 32},
        needs_text=False,
    ),
    "w8a16": Kind("8 bits by plain rounding, in compressed-tensors' layout", {"group_size": -1}),
    "exl2": Kind(
        "EXL2: the bits that are asked for on average, most where they pay most",
        {"bits": 4.0, "samples": 128},
    ),
}


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """MODEL, OUT, what codes are made and by which text."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "methods, and what they take:\n" + "\n".join(
        f"  {name:<8} {kind.help}\n{'':<11}{_defaults(kind)}" for name, kind in METHODS.items()
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model that is not quantised")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; one that was begun is finished"
    )
    parser.add_argument("--method", choices=METHODS, default=next(iter(METHODS)), help="[%(default)s]")
    parser.add_argument("--bits", type=_number, metavar="N", help="of a weight")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="input features that share a scale, -1 for all of a row"
    )
    parser.add_argument(
        "--asymmetric", action="store_true", default=None, help="give each group a zero point of its own"
    )
    parser.add_argument(
        "--desc-act", action="store_true", default=None,
        help="groups of columns with inputs of like size, not of neighbours; slower to serve, and rarely better",
    )  # fmt: skip
    _add_text(parser, "--calibration", "text to calibrate with, and in its last fifth to measure by", None)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """MODEL, the model to compare with, and the text."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--against", metavar="BASE", help="folder or Hub id of the model it should be like")
    _add_text(parser, "--text", "text to measure by; its last fifth is used", 32)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def settle(args: argparse.Namespace) -> None:
    """Give what was left out the defaults of its method. Raises StartupError for what the method does not take."""
    kind = METHODS[args.method]
    takes = kind.takes
    for option in OPTIONS:
        if getattr(args, option) is None:
            setattr(args, option, takes.get(option))
        elif option not in takes:
            own = ", ".join(map(_dashed, takes)) or "none of them"
            raise StartupError(
                f"{_dashed(option)} means nothing to --method {args.method}, which takes {own}; leave it out"
            )
    if args.samples is not None and args.samples < (least := 1 if kind.needs_text else 0):
        raise StartupError(f"--samples is {args.samples}; --method {args.method} needs {least} or more")


def _add_text(parser: argparse.ArgumentParser, name: str, what: str, samples: int | None) -> None:
    parser.add_argument(
        name, dest="text", type=Path, metavar="FILE", help=f"{what} [Python's documentation of itself]"
    )
    parser.add_argument(
        "--samples", type=int, default=samples, metavar="N",
        help="pieces of it" + (f" [{samples}]" if samples else " to calibrate with"),
    )  # fmt: skip
    parser.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens of a piece [%(default)s]"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="[all cores]")


def _defaults(kind: Kind) -> str:
    """Its options as they would be typed, with their defaults."""
    shown = [
        _dashed(option) if default is None or isinstance(default, bool) else f"{_dashed(option)} {default}"
        for option, default in kind.takes.items()
    ]
    return " ".join(shown)


def _dashed(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits")
    return int(value) if value == int(value) else value
