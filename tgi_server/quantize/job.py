"""One model on its way to fewer bits, layer by layer."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import load_product
from tgi_server.layers.weights import Weights
from tgi_server.memory import usable_memory_bytes
from tgi_server.models import load_model
from tgi_server.quantization.detect import scheme_of
from tgi_server.quantize.folder import Unfinished
from tgi_server.quantize.forward import Forward
from tgi_server.quantize.methods.method import Method
from tgi_server.quantize.observe import hessians
from tgi_server.quantize.progress import Progress
from tgi_server.quantize.text import windows

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")
_REST = "rest"


class Job:
    """Writes args.out from `source`. Raises StartupError if one of them, or what is asked, does not fit."""

    def __init__(self, source: Path, args: argparse.Namespace, method: Method) -> None:
        self._source, self._args, self._method = source, args, method
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
                method.check(f"{source}: {linear.names[0]}", linear.in_features)
        settings = {
            key: str(value) for key, value in vars(args).items() if key not in ("memory", "threads", "out")
        }
        self._out = Unfinished(source, args.out, settings)
        self._written: set[str] = set()

    def run(self) -> None:
        """Every layer that is not there yet, then what is not quantised, then the config."""
        progress = Progress(len(self._layers))
        waiting = []
        for layer in self._layers:
            if self._out.has(layer):
                self._serve(layer, self._out.load(layer))
                progress.done(layer, "was there")
            else:
                waiting.append(layer)
        if self._method.needs_statistics:
            self._with_statistics(waiting, progress)
        else:
            for layer in waiting:
                self._quantise(layer, {}, progress)
        self._out.save(_REST, self._rest())
        self._out.finish([*self._layers, _REST], self._method.section())

    def _with_statistics(self, waiting: list[str], progress: Progress) -> None:
        texts = windows(self._source, self._args.text, self._args.samples, self._args.length, held_back=False)
        for layers in self._within_memory(waiting):
            observed = {name: linear for layer in layers for name, linear in self._layers[layer].items()}
            progress.say(f"reading {sum(map(len, texts))} tokens for {len(layers)} layers")
            found = hessians(self._forward, observed, texts)
            for layer in layers:
                self._quantise(layer, {name: found.pop(name) for name in self._layers[layer]}, progress)

    def _quantise(self, layer: str, found: Mapping[str, Tensor], progress: Progress) -> None:
        """Write a layer's matrices as they are stored; it computes with them from now on."""
        progress.begin()
        tensors: dict[str, Tensor] = {}
        for first, linear in self._layers[layer].items():
            matrices = {
                name: self._weights.stored(f"{name}.weight", out, linear.in_features).float()
                for name, out in zip(linear.names, linear.outs, strict=True)
            }
            tensors |= self._method.quantise(matrices, found.get(first))
        self._out.save(layer, tensors)
        self._serve(layer, tensors)
        progress.done(layer, "")

    def _serve(self, layer: str, tensors: dict[str, Tensor]) -> None:
        """Let a layer compute with what is written, read back by its format."""
        held = _Held(self._source, tensors)
        weights = replace(self._weights, checkpoint=held, scheme=self._method.scheme)
        for linear in self._layers[layer].values():
            linear.product = load_product(weights, linear.names, linear.in_features, linear.outs)
        self._written |= tensors.keys()

    def _rest(self) -> dict[str, Tensor]:
        """What is not quantised, as it is."""
        gone = {
            f"{name}.weight"
            for linears in self._layers.values()
            for linear in linears.values()
            for name in linear.names
        }
        kept = self._checkpoint.names() - gone - self._written
        return {name: self._checkpoint.tensor(name) for name in kept}

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
    """Tensors that are about to be written, or were by an earlier run."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder, self._tensors = folder, tensors

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._tensors.get(name)
        if found is None or found.shape != shape:
            raise StartupError(
                f"{name} of the run to go on with is damaged; remove the folder and begin again"
            )
        return found


def _layers(model: torch.nn.Module) -> dict[str, dict[str, Linear]]:
    """The linears of each block by its name and their own; the head belongs to no block."""
    found: dict[str, dict[str, Linear]] = {}
    for module in model.modules():
        if isinstance(module, Linear) and (match := _LAYER.match(module.names[0])):
            found.setdefault(match[1], {})[module.names[0]] = module
    return found
