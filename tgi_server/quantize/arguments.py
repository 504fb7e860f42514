"""The arguments of `tgi-server quantize` and `tgi-server eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

METHODS = ("gptq", "nearest")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """MODEL, OUT, what codes are made and by which text."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model that is not quantised")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; one that was begun is finished"
    )
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0],
        help="gptq: by what the calibration text shows of the inputs; nearest: plain rounding [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="of a weight [%(default)s]")
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N",
        help="input features that share a scale, -1 for all of a row [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--asymmetric", action="store_true", help="give each group a zero point of its own")
    parser.add_argument(
        "--desc-act", action="store_true",
        help="round columns with the largest inputs first: better, and a little slower to serve",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, metavar="GIB",
        help="for statistics; the less, the more often the text is read [half of what is free]",
    )  # fmt: skip
    _add_text(parser, "--calibration", "text to calibrate with", 128)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """MODEL, the model to compare with, and the text."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--against", metavar="BASE", help="folder or Hub id of the model it should be like")
    _add_text(parser, "--text", "text to measure by; its last fifth is used", 32)


def _add_text(parser: argparse.ArgumentParser, name: str, what: str, samples: int) -> None:
    parser.add_argument(
        name, dest="text", type=Path, metavar="FILE", help=f"{what} [Python's documentation of itself]"
    )
    parser.add_argument(
        "--samples", type=int, default=samples, metavar="N", help="pieces of it [%(default)s]"
    )
    parser.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens of a piece [%(default)s]"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="[all cores]")
