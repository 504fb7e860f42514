"""One model on its way to fewer bits, layer by layer."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import load_product
from tgi_server.layers.weights import Weights
from tgi_server.models import load_model
from tgi_server.models.decoder import Block
from tgi_server.quantization.detect import scheme_of
from tgi_server.quantize.fold import divided, sources
from tgi_server.quantize.folder import Unfinished
from tgi_server.quantize.forward import Forward
from tgi_server.quantize.methods.method import Method, Rescales
from tgi_server.quantize.observe import Walk
from tgi_server.quantize.progress import Progress
from tgi_server.quantize.survey import Plans, Survey
from tgi_server.quantize.text import windows

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")
_REST, _PLAN = "rest", "plan"
_SURVEYED = 4  # one piece of text in so many is enough for a survey, which is after shares of errors


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
        self._blocks: dict[str, Block] = {
            layer: cast(Block, block) for layer, block in zip(self._layers, model.blocks, strict=True)
        }
        for linears in self._layers.values():
            for linear in linears.values():
                method.check(f"{source}: {linear.names[0]}", linear.in_features)
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("threads", "out")}
        self._out = Unfinished(source, args.out, settings)
        self._written: set[str] = set()

    def run(self) -> None:
        """Every layer that is not there yet, then what is not quantised, then the config."""
        progress = Progress(len(self._layers))
        missing = [layer for layer in self._layers if not self._out.has(layer)]
        if isinstance(self._method, Plans) and missing:
            self._method.plan = self._planned(self._method, progress)
        walk = self._walk(progress) if self._method.needs_statistics and missing else None
        for index, layer in enumerate(self._layers):
            if self._out.has(layer):
                self._serve(layer, self._out.load(layer))
                progress.done(layer, "was there")
            else:
                progress.begin()
                found = walk.observe(index, self._layers[layer]) if walk else {}
                self._quantise(layer, found)
                progress.done(layer, "")
            if walk is not None and index + 1 < len(self._layers):
                walk.follow(index)
        self._out.save(_REST, self._rest())
        self._out.finish([*self._layers, _REST], self._method.section())

    def _planned(self, method: Plans, progress: Progress) -> dict[str, Tensor]:
        """What the method measures, once for all runs."""
        if not self._out.has(_PLAN):
            texts = self._texts(-(-self._args.samples // _SURVEYED))
            progress.say("measuring what each matrix means to the answers")
            self._out.save(_PLAN, method.measure(Survey(self._forward, self._layers, self._weights, texts)))
        return self._out.load(_PLAN)

    def _texts(self, samples: int) -> list[Tensor]:
        args = self._args
        return windows(self._source, args.text, samples, args.length, held_back=False)

    def _walk(self, progress: Progress) -> Walk:
        texts = self._texts(self._args.samples)
        progress.say(f"reading {sum(map(len, texts))} tokens, layer by layer")
        return Walk(self._forward, texts)

    def _quantise(self, layer: str, hessians: dict[str, Tensor]) -> None:
        """Write a layer's matrices as they are stored; it computes with them from now on."""
        matrices = {first: self._matrices(linear) for first, linear in self._layers[layer].items()}
        tensors: dict[str, Tensor] = {}
        if hessians and isinstance(self._method, Rescales):
            tensors = self._rescaled(self._method, layer, matrices, hessians)
        for first, parts in matrices.items():
            tensors |= self._method.quantise(parts, hessians.pop(first, None))
        self._out.save(layer, tensors)
        self._serve(layer, tensors)

    def _matrices(self, linear: Linear) -> dict[str, Tensor]:
        return {
            name: self._weights.stored(f"{name}.weight", out, linear.in_features).float()
            for name, out in zip(linear.names, linear.outs, strict=True)
        }

    def _rescaled(
        self,
        method: Rescales,
        layer: str,
        matrices: Mapping[str, dict[str, Tensor]],
        hessians: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Multiply columns in `matrices`, change `hessians` alike, and return the norms that make up for it."""
        norms: dict[str, Tensor] = {}
        for first, source in sources(layer, self._blocks[layer]).items():
            scales = method.column_scales(torch.cat(list(matrices[first].values())), hessians[first])
            if source.norm is not None:
                norm = self._checkpoint.tensor(source.name)
                norms[source.name], scales = divided(norm, scales)
            else:
                (rows,) = (parts for parts in matrices.values() if source.name in parts)
                rows[source.name] = rows[source.name] / scales[:, None]
            for name, matrix in matrices[first].items():
                matrices[first][name] = matrix * scales
            hessians[first] = hessians[first] / (scales[:, None] * scales)
        return norms

    @torch.inference_mode()
    def _serve(self, layer: str, tensors: dict[str, Tensor]) -> None:
        """Let a layer compute with what is written, read back by its format."""
        held = _Held(self._source, tensors)
        weights = replace(self._weights, checkpoint=held, scheme=self._method.scheme)
        for linear in self._layers[layer].values():
            linear.product = load_product(weights, linear.names, linear.in_features, linear.outs)
        for source in sources(layer, self._blocks[layer]).values():
            if source.norm is not None and source.name in tensors:
                source.norm.weight.copy_(tensors[source.name])
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


class _Held:
    """Tensors that are about to be written, or were by an earlier run."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder, self._tensors = folder, tensors

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise self._damaged(name)
        return tuple(self._tensors[name].shape)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._tensors.get(name)
        if found is None or found.shape != shape:
            raise self._damaged(name)
        return found

    def _damaged(self, name: str) -> StartupError:
        return StartupError(f"{name} of the run to go on with is damaged; remove the folder and begin again")


def _layers(model: torch.nn.Module) -> dict[str, dict[str, Linear]]:
    """The linears of each block by its name and their own; the head belongs to no block."""
    found: dict[str, dict[str, Linear]] = {}
    for module in model.modules():
        if isinstance(module, Linear) and (match := _LAYER.match(module.names[0])):
            found.setdefault(match[1], {})[module.names[0]] = module
    return found
