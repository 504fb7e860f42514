"""`tgi-server quantize` and `tgi-server eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tgi_kernels.cpu import num_threads, set_num_threads
from tgi_server.checkpoint.hub import model_folder
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import ModelConfig
from tgi_server.models import load_model
from tgi_server.quantize.arguments import settle
from tgi_server.quantize.evaluate import evaluate
from tgi_server.quantize.forward import Forward
from tgi_server.quantize.job import Job
from tgi_server.quantize.methods import make_method
from tgi_server.quantize.text import windows


def run_quantize(args: argparse.Namespace) -> None:
    """Write args.out from args.model, then say how good it is. Raises StartupError."""
    settle(args)
    args.model = source = model_folder(args.model)
    method = make_method(args)
    _use_threads(args.threads)
    Job(source, args, method).run()
    pieces = windows(source, args.text, 16, args.length, held_back=True)
    own, base = forward_of(args.out, args.length), forward_of(source, args.length)
    print(*evaluate(own, pieces, base).lines(), sep="\n")


def run_eval(args: argparse.Namespace) -> None:
    """Print the quality of args.model. Raises StartupError."""
    _use_threads(args.threads)
    folder = model_folder(args.model)
    pieces = windows(folder, args.text, args.samples, args.length, held_back=True)
    base = forward_of(model_folder(args.against), args.length) if args.against else None
    quality = evaluate(forward_of(folder, args.length), pieces, base)
    print(*([quality.as_json()] if args.json else quality.lines()), sep="\n")


def forward_of(folder: Path, tokens: int) -> Forward:
    """The model in `folder`, for pieces of so many tokens at most. Raises StartupError if it cannot be loaded."""
    config = ModelConfig.from_folder(folder)
    return Forward(
        load_model(open_checkpoint(folder), config, torch.device("cpu"), torch.float32), config, tokens
    )


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        set_num_threads(threads)
    torch.set_num_threads(num_threads())
