"""Matrices of whole numbers in compressed-tensors' "pack-quantized" layout.

weight_packed int32 [out, ⌈in · bits / 32⌉], codes plus 2^(bits - 1) one after another along each row; weight_scale
[out, groups]; weight_zero_point int32 [⌈out · bits / 32⌉, groups], packed the same way down its columns, unless
symmetric; weight_shape; weight_g_idx int32 [in] if columns are not group after group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import Tensors, group_count, read_as, read_scales, unpack_stream


def read_packed(
    tensors: Tensors,
    name: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    *,
    symmetric: bool,
) -> QuantWeight:
    """Matrix `name`; group_size: columns that share a scale, -1 for all."""
    where = f"{tensors.folder}: {name}"
    groups, size = group_count(where, in_features, group_size)
    if f"{name}.weight_shape" in tensors.names():
        stated = read_as(tensors, f"{name}.weight_shape", (2,), torch.int64, torch.int32).tolist()
        if stated != [out_features, in_features]:
            raise StartupError(
                f"{where}.weight_shape is {stated}; config.json asks for {[out_features, in_features]}"
            )
    shape = (out_features, -(-in_features * bits // 32))
    codes = unpack_stream(read_as(tensors, f"{name}.weight_packed", shape, torch.int32), bits, in_features)
    scales = read_scales(tensors, f"{name}.weight_scale", (out_features, groups))
    zeros = torch.full((out_features, groups), 1 << (bits - 1), dtype=torch.int16)
    if not symmetric:
        shape = (-(-out_features * bits // 32), groups)
        packed = read_as(tensors, f"{name}.weight_zero_point", shape, torch.int32)
        zeros = unpack_stream(packed.T, bits, out_features).short().T
    order = _order(tensors, name, groups, size)
    if order is not None:
        codes = codes.index_select(1, order)
    return QuantWeight(codes, scales, zeros, size, bits, order)


def _order(tensors: Tensors, name: str, groups: int, size: int) -> Tensor | None:
    """The columns group by group; None if they lie so, or if nothing says otherwise (a g_idx of all -1)."""
    leaf = f"{name}.weight_g_idx"
    if leaf not in tensors.names():
        return None
    group_of = read_as(tensors, leaf, (groups * size,), torch.int32, torch.int64).long()
    if bool((group_of == -1).all()):
        return None
    if not torch.equal(group_of.sort().values, torch.arange(groups * size) // size):
        raise StartupError(
            f"{tensors.folder}: {leaf} does not put {size} columns into each of {groups} groups"
        )
    order = group_of.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order
