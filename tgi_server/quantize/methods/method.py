"""What every way to quantise offers: stored tensors for matrices, and the format they are read with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from tgi_server.quantization.scheme import Scheme


class Method(Protocol):
    """One way to quantise, with its settings."""

    @property
    def scheme(self) -> Scheme:
        """The format that reads what this writes; the model computes with what it reads from then on."""

    @property
    def needs_statistics(self) -> bool:
        """Whether it wants the inputs' products."""

    def check(self, where: str, in_features: int) -> None:
        """Raises StartupError if a matrix of so many columns cannot be stored; `where` names it."""

    def quantise(self, matrices: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors by full name, of `matrices` that have the same inputs.

        matrices: [out, in] float32 by name, without ".weight". hessian: [in, in] float32, the sum of x · xᵀ over
        inputs x; None if they are not needed. Rows do not know of each other: several matrices may be solved as
        one. What is returned takes the place of the tensors of those names, and of the matrices' weights.
        """

    def section(self) -> dict[str, object]:
        """The `quantization_config` of config.json."""


@runtime_checkable
class Rescales(Protocol):
    """A method that has columns scaled before they are rounded, where what makes their inputs can be divided."""

    def column_scales(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """What to multiply columns by, [in] float32, positive. weight: [out, in]; hessian: [in, in], as above."""
