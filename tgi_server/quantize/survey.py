"""What each matrix of a model means to its answers, seen while all of them are dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Dense
from tgi_server.layers.weights import Weights
from tgi_server.quantize.forward import Forward
from tgi_server.quantize.observe import Walk

# A matrix is tried out on so many pieces of so many tokens; answers are compared at every fourth, for a head is
# as much work as many blocks: SmolLM2's as eight.
_PIECES: Final = 2
_TOKENS: Final = 128
_EVERY: Final = 4


class Harm(Protocol):
    """Tries a matrix out."""

    def __call__(self, name: str, other: Tensor) -> float:
        """The divergence of answers in nats a token if `other` were in the place of matrix `name`."""


@dataclass(frozen=True)
class Seen:
    """A matrix. weight: [out, in] float32. hessian: [in, in] float32, the sum of x · xᵀ over its inputs."""

    name: str
    weight: Tensor
    hessian: Tensor
    harm: Harm


@runtime_checkable
class Plans(Protocol):
    """A method that measures all matrices before it begins."""

    plan: Mapping[str, Tensor]  # what `measure` returned, in this run or in one that was stopped

    def measure(self, survey: Iterable[Seen]) -> dict[str, Tensor]:
        """The plan, by name. Raises StartupError if there is none for what is asked."""


class Survey:
    """Goes through a model, block by block. layers: the linears of each block."""

    def __init__(
        self,
        forward: Forward,
        layers: Mapping[str, Mapping[str, Linear]],
        weights: Weights,
        texts: Sequence[Tensor],
    ) -> None:
        self._forward, self._layers, self._weights = forward, layers, weights
        self._walk = Walk(forward, texts)
        self._probes = [forward.embedded(ids[:_TOKENS]) for ids in texts[:_PIECES]]
        self._expected = [self._answers(probe, 0) for probe in self._probes]

    def __iter__(self) -> Iterator[Seen]:
        for block, linears in enumerate(self._layers.values()):
            found = self._walk.observe(block, linears)
            for first, linear in linears.items():
                yield from self._matrices(block, linear, found[first])
            self._walk.follow(block)
            for probe in self._probes:
                self._forward.run_block(block, probe)

    def _matrices(self, block: int, linear: Linear, hessian: Tensor) -> Iterator[Seen]:
        stored = {
            name: self._weights.stored(f"{name}.weight", out, linear.in_features).float()
            for name, out in zip(linear.names, linear.outs, strict=True)
        }

        def harm(name: str, other: Tensor) -> float:
            dense = linear.product
            linear.product = Dense(self._weights, [other if own == name else stored[own] for own in stored])
            try:
                return self._divergence(block)
            finally:
                linear.product = dense

        for name, weight in stored.items():
            yield Seen(name, weight, hessian, harm)

    def _divergence(self, block: int) -> float:
        """Of the model as it is now, which differs from the one that is meant in this block alone."""
        total, tokens = 0.0, 0
        for probe, expected in zip(self._probes, self._expected, strict=True):
            total += float((expected.exp() * (expected - self._answers(probe, block))).double().sum())
            tokens += len(expected)
        return max(total / tokens, 0.0)

    @torch.inference_mode()
    def _answers(self, residual: Tensor, block: int) -> Tensor:
        """[tokens / 4, vocab] logarithms of probabilities, of a piece that stands before `block`."""
        residual = residual.clone()
        for index in range(block, len(self._layers)):
            self._forward.run_block(index, residual)
        model = self._forward.model
        return model.logits(model.norm(residual[::_EVERY].contiguous())).log_softmax(-1)
