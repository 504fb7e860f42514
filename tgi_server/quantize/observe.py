"""What reaches a block's matrices while text runs through a model whose earlier blocks are codes already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.activation import Gate
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Product
from tgi_server.quantize.forward import Forward

# Of the mean diagonal: how little a direction of the inputs may vary before nothing is made up for along it.
_DAMPING: Final = 0.05


class Statistics:
    """Sums over the inputs x of a linear, and over what they and the residual would be without codes before it."""

    def __init__(self, in_features: int) -> None:
        self.hessian = torch.zeros(in_features, in_features)  # Σ x · xᵀ
        self._drift = torch.zeros(in_features, in_features)  # Σ (meant x - x) · xᵀ
        self._residual_drift: Tensor | None = None  # Σ (meant residual - residual) · xᵀ, [out, in]

    def add(self, found: _Recorder, meant: _Recorder) -> None:
        """One piece of text."""
        x = found.x
        self.hessian.addmm_(x.T, x)
        self._drift.addmm_((meant.x - x).T, x)
        if found.residual is not None and meant.residual is not None:
            apart = meant.residual - found.residual
            if self._residual_drift is None:
                self._residual_drift = torch.zeros(apart.shape[1], x.shape[1])
            self._residual_drift.addmm_(apart.T, x)

    def target(self, weight: Tensor) -> Tensor:
        """The matrix whose products with the inputs that are found come nearest to what is meant.

        Those are the products of `weight` with the meant inputs, and, where they are added to a residual, what the
        residual lacks. weight: [out, in] float32.
        """
        damped = self.hessian.double()
        diagonal = damped.diagonal()
        diagonal += _DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
        wanted = weight.double() @ self._drift.double()
        if self._residual_drift is not None:
            wanted += self._residual_drift
        change: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T
        return weight + change.float()


class Walk:
    """Pieces of text on their way through the blocks, twice: as they are meant to be, and as codes make them."""

    def __init__(self, forward: Forward, texts: Sequence[Tensor]) -> None:
        self._forward = forward
        self._meant = [forward.embedded(ids) for ids in texts]
        self._found = [residual.clone() for residual in self._meant]
        self.tokens = sum(map(len, texts))

    def observe(self, block: int, linears: Mapping[str, Linear]) -> dict[str, Statistics]:
        """What reaches `linears`, those of a block that is still dense; texts as they are meant to be go past it."""
        statistics = {name: Statistics(linear.in_features) for name, linear in linears.items()}
        with _recording(linears) as recorders:
            for meant, found in zip(self._meant, self._found, strict=True):
                self._forward.run_block(block, meant)
                wanted = {name: recorder.taken() for name, recorder in recorders.items()}
                self._forward.run_block(block, found.clone())
                for name, recorder in recorders.items():
                    statistics[name].add(recorder, wanted[name])
        return statistics

    def skip(self, block: int) -> None:
        """Take the texts as they are meant to be past a block that is still dense."""
        for meant in self._meant:
            self._forward.run_block(block, meant)

    def follow(self, block: int) -> None:
        """Take the others past it, which has its codes now."""
        for found in self._found:
            self._forward.run_block(block, found)


class _Recorder:
    """A product that keeps what it was last given."""

    def __init__(self, product: Product) -> None:
        self.product, self.kind = product, product.kind
        self.x = torch.empty(0)
        self.residual: Tensor | None = None

    def taken(self) -> _Recorder:
        """What it has, for good."""
        other = _Recorder(self.product)
        other.x, other.residual = self.x, self.residual
        return other

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        residual: Tensor | None = None,
        gate: Gate | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        self.x = x
        self.residual = None if residual is None else residual.clone()
        return self.product(x, bias, residual=residual, gate=gate, out=out)


@contextmanager
def _recording(linears: Mapping[str, Linear]) -> Iterator[dict[str, _Recorder]]:
    recorders = {name: _Recorder(linear.product) for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.product = recorders[name]
        yield recorders
    finally:
        for name, linear in linears.items():
            linear.product = recorders[name].product
