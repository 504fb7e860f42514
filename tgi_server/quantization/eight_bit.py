"""Matrices of one byte a weight beside their scales: float8 (e4m3) and whole numbers.

FP8 formats and those of 8-bit weights and activations ("W8A8") differ in the names of tensors and in which rows and
columns share a scale. Activations are not rounded here, whatever the format would do with them at run time.
"""

from __future__ import annotations

from math import gcd
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import Section, Tensors, read_as

Tile = tuple[int, int]  # rows and columns of a matrix that share a scale

_SCALES: Final = (torch.float32, torch.bfloat16, torch.float16)
_POWERS: Final = torch.float8_e8m0fnu  # exponents of two, less 127
_NAN: Final = 0x7F  # without its sign; every other code of e4m3 is a number
_CHECKED_ROWS: Final = 16  # at a time: what is made of them stays in the cache, 3 GB/s instead of 0.6


def read_e4m3(tensors: Tensors, name: str, tile: Tile, scale: str, out: int, columns: int) -> QuantWeight:
    """Matrix `name`.weight [out, columns] of float8 (e4m3) with the scales in tensor `scale`."""
    stored = read_as(tensors, f"{name}.weight", (out, columns), torch.float8_e4m3fn)
    codes = stored.view(torch.uint8)
    if any(int((rows & _NAN).amax()) == _NAN for rows in codes.split(_CHECKED_ROWS)):
        bad = int(stored.float().isnan().sum())
        raise StartupError(
            f"{tensors.folder}: {bad} of {codes.numel()} weights in {name}.weight are NaN; quantise the model again"
        )
    scales = read_scales(tensors, scale, tile, out, columns)
    return QuantWeight(codes, scales.float(), None, columns // scales.shape[1], 8, values="e4m3")


def read_integers(
    tensors: Tensors, name: str, tile: Tile, bits: int, out: int, columns: int, zero_point: str | None = None
) -> QuantWeight:
    """Matrix `name`.weight [out, columns] of int8, from -2^(bits - 1), with `name`.weight_scale.

    zero_point: the tensor of int8 that is subtracted from codes, of the scales' shape; None: nothing is.
    """
    half = 1 << (bits - 1)
    stored = read_as(tensors, f"{name}.weight", (out, columns), torch.int8)
    if bits < 8:
        low, high = int(stored.min()), int(stored.max())
        if low < -half or high >= half:
            raise StartupError(
                f"{tensors.folder}: {name}.weight holds numbers from {low} to {high}; its config says {bits} bits"
            )
    scales = _in_16_bits(read_scales(tensors, f"{name}.weight_scale", tile, out, columns))
    size = columns // scales.shape[1]
    zeros = torch.full(scales.shape, half, dtype=torch.int16)
    if zero_point is not None:
        points = read_as(tensors, zero_point, tensors.shape(zero_point), torch.int8).short()
        low, high = int(points.min()), int(points.max())
        if low < -half or high >= half:
            raise StartupError(
                f"{tensors.folder}: {zero_point} holds {low} to {high}; its config says {bits} bits"
            )
        zeros += _spread(tensors, zero_point, points, tile, out, columns)
    return QuantWeight((stored.short() + half).to(torch.uint8), scales, zeros, size, bits)


def read_scales(tensors: Tensors, name: str, tile: Tile, out: int, columns: int) -> Tensor:
    """The scales in tensor `name` of a matrix [out, columns], one for each row and group: [out, groups].

    Raises StartupError for a shape that does not fit, and for scales that are not positive numbers.
    """
    stored = read_as(tensors, name, tensors.shape(name), *_SCALES, _POWERS, torch.uint8)
    if stored.dtype == torch.uint8:
        stored = stored.view(_POWERS)
    return _spread(tensors, name, check_positive(tensors, name, stored), tile, out, columns)


def check_positive(tensors: Tensors, name: str, scales: Tensor) -> Tensor:
    """The scales, powers of two as float32. Raises StartupError if one is NaN, infinite, zero or negative."""
    scales = scales.float() if scales.dtype == _POWERS else scales
    good = scales.isfinite() & (scales > 0)
    if bad := int((~good).sum()):
        first = float(scales[~good].flatten()[0])
        raise StartupError(
            f"{tensors.folder}: {bad} of {scales.numel()} scales in {name} are no positive numbers ({first:g} is "
            "one); quantise the model again"
        )
    return scales


def check_input_scale(tensors: Tensors, name: str, *, needed: bool) -> None:
    """Raises StartupError if matrix `name` has no scale of its inputs though needed, or one that is damaged.

    It is not used: inputs are not rounded.
    """
    names = tensors.names()
    found = [leaf for leaf in ("input_scale", "activation_scale") if f"{name}.{leaf}" in names]
    if needed and not found:
        raise StartupError(
            f"{tensors.folder}: its config says that activations are scaled by stored numbers (static), but there is "
            f"no {name}.input_scale"
        )
    for leaf in found:
        scale = f"{name}.{leaf}"
        check_positive(tensors, scale, read_as(tensors, scale, tensors.shape(scale), *_SCALES))


def block_of(section: Section, key: str, where: str) -> Tile | None:
    """section[key]: rows and columns of a block; None if it is absent."""
    block = section.get(key)
    if block is None:
        return None
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(edge) is int and edge > 0 for edge in block)
    ):
        raise StartupError(f"{where}: {key} is {block!r}; two positive numbers are needed, rows and columns")
    return block[0], block[1]


def _spread(tensors: Tensors, name: str, stored: Tensor, tile: Tile, out: int, columns: int) -> Tensor:
    """[out, groups] of numbers stored for tiles. Groups are as wide as a tile or, so that they cover columns that a
    tile does not divide, a part of it.
    """
    grid = (-(-out // tile[0]), -(-columns // tile[1]))
    if [n for n in stored.shape if n != 1] != [n for n in grid if n != 1]:
        raise StartupError(
            f"{tensors.folder}: {name} has shape {tuple(stored.shape)}; {out} rows and {columns} columns in tiles of "
            f"{tile[0]}×{tile[1]} ask for {grid}"
        )
    size = columns if grid[1] == 1 else gcd(tile[1], columns)
    if size % 8 and size != columns:
        raise StartupError(
            f"{tensors.folder}: {name} has {grid[1]} numbers for {columns} columns; columns in tiles of {tile[1]} are "
            "served if both are multiples of 8"
        )
    rows = stored.reshape(grid).repeat_interleave(tile[0], 0)[:out]
    of_group = torch.arange(0, columns, size) // tile[1]
    return rows.index_select(1, of_group)


def _in_16_bits(scales: Tensor) -> Tensor:
    """As what GPU kernels multiply with, if that can hold them."""
    if scales.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(scales.to(dtype).float(), scales):
                return scales.to(dtype)
    return scales
