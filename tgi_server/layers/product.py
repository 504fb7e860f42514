"""The matrix products behind `Linear`: dense or quantised, as the checkpoint holds each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tgi_kernels.activation import Gate
from tgi_kernels.fp8 import Fp8Rows, fits_fp8, fp8_linear, pack_fp8
from tgi_kernels.int8 import fits_int8, int8_linear, pack_int8
from tgi_kernels.matmul import GATED, linear, pack_linear
from tgi_kernels.quant import PackedQuant, fits_kernels, pack_quant, quant_linear
from tgi_kernels.quant_cpu import PackedCpu
from tgi_kernels.quant_cuda import has_fused_product
from tgi_kernels.quant_segments import Segments, dequantise_segments, segments_fit, stack_segments
from tgi_kernels.quant_weight import QuantWeight, dequantise, fits_together, ordered_rows, stack
from tgi_server.layers.ending import Ending
from tgi_server.layers.segmented import Segmented
from tgi_server.layers.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Product(Protocol):
    """x · Wᵀ for the matrices it was made of, stacked. `kind`: their format and the way they are multiplied."""

    kind: str

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        """y = x · Wᵀ + bias, and what `Ending` says. x: [tokens, in_features]; bias: [out_features]."""


class Dense:
    """Matrices in 16 or 32 bits. `of`: the format they were widened from."""

    def __init__(self, weights: Weights, matrices: Sequence[Tensor], of: str = "") -> None:
        if weights.device.type != "cpu":
            matrix = weights.on_device(*matrices)
        else:
            matrix = torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]
            if matrix.dtype != torch.bfloat16:
                # CPU kernels widen bf16 as they read it, exactly; fp16 they do not know.
                matrix = matrix.float()
        name = str(matrix.dtype).removeprefix("torch.")
        self.kind = f"{of} · widened at load to {name}" if of else f"{name} · dense"
        self.packed = pack_linear(matrix)

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        return linear(x, self.packed, bias, **ending)


class Quantised:
    """A matrix of a few bits that kernels take."""

    def __init__(self, weights: Weights, matrix: QuantWeight | Segments) -> None:
        self.packed = pack_quant(matrix, weights.dtype, deterministic=weights.deterministic)
        self.kind = f"{_unrounded(weights, matrix)} · {_way(weights.device, self.packed)}"

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        return quant_linear(x, self.packed, bias, **ending)

    def take_order(self) -> Tensor | None:
        """That of the codes' columns; from now on those of x have to be in it."""
        order = self.packed.order
        self.packed = replace(self.packed, order=None)
        return order


class Fp8:
    """A matrix of float8 whose inputs are rounded to float8 too."""

    def __init__(self, weights: Weights, matrix: QuantWeight) -> None:
        scales = "stored scales" if matrix.input_scale is not None else "scales by token"
        scales += " and 128 columns" if matrix.inputs == "blocks" else ""
        self.kind = f"{_format(weights, matrix)} · activations rounded to e4m3, {scales}"
        self.packed = pack_fp8(matrix)

    def __call__(self, x: Tensor | Fp8Rows, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        return fp8_linear(x, self.packed, bias, **ending)


class Int8:
    """A matrix of int8 whose inputs are rounded to int8 too."""

    def __init__(self, weights: Weights, matrix: QuantWeight) -> None:
        scales = "a stored scale" if matrix.input_scale is not None else "scales by token"
        self.kind = f"{_format(weights, matrix)} · activations rounded to int8, {scales}"
        self.packed = pack_int8(matrix)

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        return int8_linear(x, self.packed, bias, **ending)


class SideBySide:
    """Products that cannot be one, such as of a dense and a quantised matrix."""

    def __init__(self, products: Sequence[Product], outs: Sequence[int]) -> None:
        self.products = products
        self.outs = list(outs)
        self.kind = " + ".join(dict.fromkeys(product.kind for product in products))

    def __call__(self, x: Tensor, bias: Tensor | None, **ending: Unpack[Ending]) -> Tensor:
        biases = [None] * len(self.outs) if bias is None else bias.split_with_sizes(self.outs)
        parts = [product(x, part) for product, part in zip(self.products, biases, strict=True)]
        return _finished(parts, **ending)


def load_product(
    weights: Weights,
    names: Sequence[str],
    in_features: int,
    outs: Sequence[int],
    rows: Tensor | None = None,
) -> Product:
    """The product of the matrices `names`, which have `outs` rows. Neighbours that fit together are one.

    rows: [rows of each matrix] int32 or int64, the order that they are put in; None: their own.
    """
    products: list[Product] = []
    widths: list[int] = []
    matrices = [weights.matrix(name, out, in_features) for name, out in zip(names, outs, strict=True)]
    if rows is not None:
        matrices = [_reordered(matrix, rows) for matrix in matrices]
    while matrices:
        count = next(
            (i for i in range(1, len(matrices)) if not _fit(matrices[0], matrices[i])), len(matrices)
        )
        run, matrices = matrices[:count], matrices[count:]
        widths.append(sum(_rows(matrix) for matrix in run))
        products.append(_product(weights, run))
    return products[0] if len(products) == 1 else SideBySide(products, widths)


def take_order(product: Product) -> Tensor | None:
    """[in_features] int32, the order that columns of x have to be in from now on; None: their own, as before.

    What has an order gathers columns itself until it is taken.
    """
    return product.take_order() if isinstance(product, (Quantised, Segmented)) else None


def _finished(
    parts: list[Tensor],
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The steps after products that have no kernel with them."""
    if gate is not None:
        return GATED[gate](torch.cat(parts, 1), out)
    if residual is None:
        return torch.cat(parts, 1, out=out)
    return torch.add(residual, torch.cat(parts, 1), out=out)


def _product(weights: Weights, run: Sequence[Tensor | QuantWeight | Segments]) -> Product:
    """Of matrices that fit together."""
    dense = [matrix for matrix in run if isinstance(matrix, Tensor)]
    if dense:
        return Dense(weights, dense)
    if segments := [matrix for matrix in run if isinstance(matrix, Segments)]:
        return _segmented_product(weights, segments)
    return quantised_product(weights, [part for part in run if isinstance(part, QuantWeight)])


def quantised_product(weights: Weights, parts: Sequence[QuantWeight]) -> Product:
    """Of matrices of a few bits; of the dense matrix they stand for, where no kernel multiplies them as they are."""
    whole = (stack(parts) if len(parts) > 1 else parts[0]).to(weights.device)
    if weights.dtype != torch.float32 and fits_fp8(whole):
        return Fp8(weights, whole)
    if fits_int8(whole):
        return Int8(weights, whole)
    if fits_kernels(whole):
        return Quantised(weights, whole)
    return Dense(weights, [dequantise(whole, weights.dtype)], _unrounded(weights, whole))


def _unrounded(weights: Weights, matrix: QuantWeight | Segments) -> str:
    """The format of a matrix whose inputs stay as they are."""
    note = "" if isinstance(matrix, Segments) or matrix.inputs == "exact" else ", activations not rounded"
    return _format(weights, matrix) + note


def _way(device: torch.device, packed: PackedQuant) -> str:
    """How it is multiplied."""
    if device.type != "cpu" and not has_fused_product(device):
        return "widened for each product"
    if isinstance(packed, PackedCpu) or packed.most_fused is None:
        return "fused"
    return f"fused up to {packed.most_fused} tokens"


def _format(weights: Weights, matrix: QuantWeight | Segments) -> str:
    if weights.scheme is not None:
        return weights.scheme.title
    return f"{matrix.bits} bit {matrix.values}" if isinstance(matrix, QuantWeight) else "segments"


def _segmented_product(weights: Weights, matrices: Sequence[Segments]) -> Product:
    whole = (stack_segments(matrices) if len(matrices) > 1 else matrices[0]).to(weights.device)
    if fits_kernels(whole):
        return Quantised(weights, whole)
    if Segmented.takes(whole):
        return Segmented(weights, whole)
    return Dense(weights, [dequantise_segments(whole, weights.dtype)], _format(weights, whole))


def _rows(matrix: Tensor | QuantWeight | Segments) -> int:
    if isinstance(matrix, Segments):
        return _rows(matrix.parts[0])
    return len(matrix if isinstance(matrix, Tensor) else matrix.codes)


def _reordered(matrix: Tensor | QuantWeight | Segments, rows: Tensor) -> Tensor | QuantWeight | Segments:
    if isinstance(matrix, Segments):
        return Segments(tuple(ordered_rows(part, rows) for part in matrix.parts), matrix.order)
    if isinstance(matrix, QuantWeight):
        return ordered_rows(matrix, rows)
    return matrix.index_select(0, rows.to(matrix.device))


def _fit(a: Tensor | QuantWeight | Segments, b: Tensor | QuantWeight | Segments) -> bool:
    """Whether both can be rows of one matrix."""
    if isinstance(a, Segments) and isinstance(b, Segments):
        return segments_fit(a, b)
    if isinstance(a, QuantWeight) and isinstance(b, QuantWeight):
        return fits_together(a, b)
    return isinstance(a, Tensor) and isinstance(b, Tensor)
