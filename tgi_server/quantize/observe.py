"""What reaches a block's matrices while text runs through a model whose earlier blocks are codes already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tgi_server.layers.ending import Ending
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Product
from tgi_server.quantize.forward import Forward

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Walk:
    """Pieces of text on their way through the blocks of a model."""

    def __init__(self, forward: Forward, texts: Sequence[Tensor]) -> None:
        """texts: token ids, [tokens] each."""
        self._forward = forward
        self._residuals = [forward.embedded(ids) for ids in texts]

    def observe(self, block: int, linears: Mapping[str, Linear]) -> dict[str, Tensor]:
        """The sum of x · xᵀ, [in, in] float32, over the inputs x of each of the block's `linears`; texts stay put."""
        with _observing(linears) as observers:
            for residual in self._residuals:
                self._forward.run_block(block, residual.clone())
            return {name: observer.hessian for name, observer in observers.items()}

    def follow(self, block: int) -> None:
        """Take the texts past a block, which has its codes now."""
        for residual in self._residuals:
            self._forward.run_block(block, residual)


class _Observer:
    """A product that adds up x · xᵀ over its inputs."""

    def __init__(self, product: Product, in_features: int) -> None:
        self.product, self.kind = product, product.kind
        self.hessian = torch.zeros(in_features, in_features)

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        self.hessian.addmm_(x.T, x)
        return self.product(x, bias, **ending)


@contextmanager
def _observing(linears: Mapping[str, Linear]) -> Iterator[dict[str, _Observer]]:
    observers = {name: _Observer(linear.product, linear.in_features) for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            linear.product = observers[name]
        yield observers
    finally:
        for name, linear in linears.items():
            linear.product = observers[name].product
