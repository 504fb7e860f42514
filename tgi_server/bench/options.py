"""What `tgi-server bench` can be asked, beside the options of a server."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tgi_server.flags import whole

# Of every request: the option's default, None: it is not sent.
SAMPLING: Final[Mapping[str, float | None]] = {
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": None,
}
# All of the command's own, for shells to complete.
NAMES: Final = (
    "url", "batch-size", "sequence-length", "decode-length", "runs", "warmups", "json",
    *(name.replace("_", "-") for name in SAMPLING),
)  # fmt: skip
BATCHES: Final = (1, 2, 4, 8, 16, 32)  # as TGI's benchmark


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options, beside those of a server it starts itself."""
    group = parser.add_argument_group("benchmark")
    count, tokens = whole(1, 4096), whole(1, 1 << 20)
    group.add_argument("--url", help="a server that runs; without one, MODEL is served while it is measured")
    group.add_argument(
        "--batch-size", "-b", type=count, action="append", metavar="N",
        help=f"requests at once; may be repeated [{', '.join(map(str, BATCHES))}]",
    )  # fmt: skip
    group.add_argument(
        "--sequence-length", "-s", type=tokens, default=10, metavar="TOKENS", help="of each prompt [10]"
    )
    group.add_argument(
        "--decode-length", "-d", type=tokens, default=8, metavar="TOKENS", help="of each answer [8]"
    )
    group.add_argument("--runs", "-r", type=count, default=10, metavar="N", help="measured [10]")
    group.add_argument("--warmups", "-w", type=count, default=1, metavar="N", help="not measured [1]")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    for name, default in SAMPLING.items():
        shown = "" if default is None else f" [{default:g}]"
        group.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=default, metavar="VALUE",
            help=f"of every request{shown}",
        )  # fmt: skip
