"""`tgi-server quantize` and `tgi-server eval`."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tgi_kernels.cpu import num_threads, set_num_threads
from tgi_server.checkpoint.hub import model_folder
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import quantised_product
from tgi_server.layers.weights import Weights
from tgi_server.memory import usable_memory_bytes
from tgi_server.models import load_model
from tgi_server.quantization.detect import scheme_of
from tgi_server.quantization.gptq import Gptq
from tgi_server.quantization.scheme import group_count
from tgi_server.quantize.evaluate import evaluate
from tgi_server.quantize.folder import Unfinished
from tgi_server.quantize.forward import Forward
from tgi_server.quantize.observe import hessians
from tgi_server.quantize.solve import Grid, gptq, nearest
from tgi_server.quantize.text import windows

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")
_REST = "rest"


def run_quantize(args: argparse.Namespace) -> None:
    """Write args.out from args.model, then say how good it is. Raises StartupError."""
    _use_threads(args.threads)
    source = model_folder(args.model)
    job = _Job(source, args)
    job.run()
    pieces = windows(source, args.text, 16, args.length, held_back=True)
    own, base = _forward(args.out, args.length), _forward(source, args.length)
    print(*evaluate(own, pieces, base).lines(), sep="\n")


def run_eval(args: argparse.Namespace) -> None:
    """Print the quality of args.model. Raises StartupError."""
    _use_threads(args.threads)
    folder = model_folder(args.model)
    pieces = windows(folder, args.text, args.samples, args.length, held_back=True)
    base = _forward(model_folder(args.against), args.length) if args.against else None
    print(*evaluate(_forward(folder, args.length), pieces, base).lines(), sep="\n")


class _Job:
    """One model on its way to fewer bits."""

    def __init__(self, source: Path, args: argparse.Namespace) -> None:
        self._source, self._args = source, args
        self._grid = Grid(args.bits, args.group_size, not args.asymmetric, args.desc_act)
        self._scheme = Gptq(args.bits, args.group_size, not args.asymmetric, args.desc_act, zero_shift=1)
        config = ModelConfig.from_folder(source)
        if scheme_of(config.raw, source) is not None:
            raise StartupError(f"{source} is quantised already; give the model that it was made of")
        self._checkpoint = Checkpoint(source)
        model = load_model(self._checkpoint, config, torch.device("cpu"), torch.float32)
        self._weights = Weights(self._checkpoint, torch.device("cpu"), torch.float32)
        self._forward = Forward(model, config, args.length)
        self._layers = _layers(model)
        for linears in self._layers.values():
            for linear in linears.values():
                group_count(f"{source}: {linear.names[0]}", linear.in_features, args.group_size)
        settings = {
            key: str(value) for key, value in vars(args).items() if key not in ("memory", "threads", "out")
        }
        self._out = Unfinished(source, args.out, settings)

    def run(self) -> None:
        progress = _Progress(len(self._layers))
        texts = windows(
            self._source, self._args.text, self._args.samples, self._args.length, held_back=False
        ) if self._args.method == "gptq" else []  # fmt: skip
        waiting = []
        for layer, linears in self._layers.items():
            if self._out.has(layer):
                self._replace(linears, self._out.load(layer))
                progress.done(layer, "was there")
            else:
                waiting.append(layer)
        for layers in self._within_memory(waiting):
            observed = {name: linear for layer in layers for name, linear in self._layers[layer].items()}
            if texts:
                progress.say(f"reading {sum(map(len, texts))} tokens for {len(layers)} layers")
            found = hessians(self._forward, observed, texts) if texts else {}
            for layer in layers:
                progress.begin()
                tensors: dict[str, Tensor] = {}
                for name, linear in self._layers[layer].items():
                    tensors |= self._quantise(linear, found.pop(name, None))
                self._out.save(layer, tensors)
                progress.done(layer, "")
        self._out.save(_REST, self._rest())
        self._out.finish([*self._layers, _REST], self._scheme.section())

    def _quantise(self, linear: Linear, hessian: Tensor | None) -> dict[str, Tensor]:
        """A linear's matrices as they are stored; it computes with them from now on."""
        matrices = [
            self._weights.stored(f"{name}.weight", out, linear.in_features)
            for name, out in zip(linear.names, linear.outs, strict=True)
        ]
        weight = torch.cat(matrices).float()  # rows do not know of each other, so all are one matrix
        codes = nearest(weight, self._grid) if hessian is None else gptq(weight, hessian, self._grid)
        linear.product = quantised_product(self._weights, [codes.stored(self._grid.bits)])
        tensors: dict[str, Tensor] = {}
        first = 0
        for name, out in zip(linear.names, linear.outs, strict=True):
            rows = slice(first, first + out)
            leaves = self._scheme.pack(
                codes.codes[rows], codes.scales[rows], codes.zeros[rows], codes.group_of
            )
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
            first += out
        return tensors

    def _replace(self, linears: Mapping[str, Linear], tensors: dict[str, Tensor]) -> None:
        """Let `linears` compute with what an earlier run has written."""
        held = _Held(self._source, tensors)
        for linear in linears.values():
            parts = [
                self._scheme.read(held, name, out, linear.in_features)
                for name, out in zip(linear.names, linear.outs, strict=True)
            ]
            linear.product = quantised_product(self._weights, parts)

    def _rest(self) -> dict[str, Tensor]:
        """What is not quantised, as it is."""
        gone = {
            f"{name}.weight"
            for linears in self._layers.values()
            for linear in linears.values()
            for name in linear.names
        }
        return {name: self._checkpoint.tensor(name) for name in self._checkpoint.names() - gone}

    def _within_memory(self, layers: list[str]) -> list[list[str]]:
        """As many layers at once as there is memory for the statistics of."""
        memory = self._args.memory
        budget = usable_memory_bytes() // 2 if memory is None else int(memory * (1 << 30))
        runs: list[list[str]] = []
        left = 0
        for layer in layers:
            needed = sum(4 * linear.in_features**2 for linear in self._layers[layer].values())
            if not runs or needed > left:
                runs.append([])
                left = budget
            left -= needed
            runs[-1].append(layer)
        return runs


class _Held:
    """Tensors that were read from a file of the work folder."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder, self._tensors = folder, tensors

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._tensors.get(name)
        if found is None or found.shape != shape:
            raise StartupError(
                f"{name} of the run to go on with is damaged; remove the folder and begin again"
            )
        return found


class _Progress:
    """A line for each layer, with what is left of the time."""

    def __init__(self, total: int) -> None:
        self._total, self._count, self._computed = total, 0, 0
        self._begin = self._spent_s = 0.0

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self) -> None:
        """A layer's codes are looked for from now on; reading text before it counts for nothing."""
        self._begin = time.monotonic()

    def done(self, layer: str, how: str) -> None:
        self._count += 1
        if not how:
            self._computed += 1
            self._spent_s += time.monotonic() - self._begin
        left = self._spent_s / max(1, self._computed) * (self._total - self._count)
        bar = "#" * (30 * self._count // self._total)
        self.say(f"[{bar:<30}] {self._count}/{self._total} {layer} {how or f'{left:.0f} s left'}")


def _layers(model: torch.nn.Module) -> dict[str, dict[str, Linear]]:
    """The linears of each block by its name and their own; the head belongs to no block."""
    found: dict[str, dict[str, Linear]] = {}
    for module in model.modules():
        if isinstance(module, Linear) and (match := _LAYER.match(module.names[0])):
            found.setdefault(match[1], {})[module.names[0]] = module
    return found


def _forward(folder: Path, tokens: int) -> Forward:
    config = ModelConfig.from_folder(folder)
    return Forward(
        load_model(open_checkpoint(folder), config, torch.device("cpu"), torch.float32), config, tokens
    )


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        set_num_threads(threads)
    torch.set_num_threads(num_threads())
