"""What a product does with its sums before it writes them."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from tgi_kernels.activation import Gate


class Ending(TypedDict, total=False):
    """Keywords of every product; none but these, each of them or not.

    residual: [tokens, out_features], may be out: residual + y is written. gate: act(first half of y) · second half
    is; not both. out: what is written, in x's type; allocated when not given.
    """

    residual: Tensor | None
    gate: Gate | None
    out: Tensor | None
