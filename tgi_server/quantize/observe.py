"""What reaches a model's matrices while text runs through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tgi_kernels.activation import Gate
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Product
from tgi_server.quantize.forward import Forward


class _Observer:
    """A product that adds up x · xᵀ over its inputs."""

    def __init__(self, product: Product, in_features: int) -> None:
        self.product = product
        self.hessian = torch.zeros(in_features, in_features)

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        residual: Tensor | None = None,
        gate: Gate | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        self.hessian.addmm_(x.T, x)
        return self.product(x, bias, residual=residual, gate=gate, out=out)


def hessians(forward: Forward, linears: Mapping[str, Linear], texts: Iterable[Tensor]) -> dict[str, Tensor]:
    """The sum of x · xᵀ, [in, in] float32, over the inputs x of each of `linears` while `texts` run."""
    with _observing(linears) as observers:
        for ids in texts:
            forward.hidden(ids)
        return {name: observer.hessian for name, observer in observers.items()}


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
