"""compressed-tensors checkpoints, "pack-quantized": whole numbers of 2 to 8 bits, activations in 16 bits.

For a matrix: weight_packed int32 [out, ⌈in · bits / 32⌉], codes plus 2^(bits − 1) one after another along each
row; weight_scale [out, groups]; weight_zero_point int32 [⌈out · bits / 32⌉, groups], packed the same way down
its columns, unless symmetric; weight_shape; weight_g_idx int32 [in] if columns are not group after group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import (
    Section,
    Tensors,
    choice,
    group_count,
    group_size_of,
    read_as,
    read_scales,
    replaces_weight,
    unpack_stream,
)


@dataclass(frozen=True)
class WeightSettings:
    """How the matrices that match `targets` are stored."""

    targets: tuple[str, ...]
    bits: int
    group_size: int
    is_symmetric: bool

    def applies_to(self, name: str) -> bool:
        """Targets are the class of all matrices, whole names, or patterns after "re:"."""
        return any(
            target in ("Linear", name)
            or (target.startswith("re:") and re.match(target[3:], name) is not None)
            for target in self.targets
        )


@dataclass(frozen=True)
class CompressedTensors:
    """The settings of a compressed-tensors checkpoint."""

    groups: tuple[WeightSettings, ...]

    @classmethod
    def from_section(cls, section: Section, where: str) -> CompressedTensors:
        choice(section, "format", ("pack-quantized",), "pack-quantized", where)
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise StartupError(f"{where}: config_groups is {groups!r}; an object of settings is needed")
        return cls(tuple(_settings(group, f"{where}: {name}") for name, group in groups.items()))

    @property
    def title(self) -> str:
        widths = sorted({group.bits for group in self.groups})
        return f"compressed-tensors {', '.join(map(str, widths))} bit"

    @property
    def leaf(self) -> str:
        return "weight_packed"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return replaces_weight(self.leaf, tensors, name)

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        where = f"{tensors.folder}: {name}"
        settings = next((group for group in self.groups if group.applies_to(name)), None)
        if settings is None:
            raise StartupError(
                f"{where}.weight_packed is there, but no config_groups of its config has it as a target"
            )
        bits = settings.bits
        groups, size = group_count(where, in_features, settings.group_size)
        if f"{name}.weight_shape" in tensors.names():
            stated = read_as(tensors, f"{name}.weight_shape", (2,), torch.int64, torch.int32).tolist()
            if stated != [out_features, in_features]:
                raise StartupError(
                    f"{where}.weight_shape is {stated}; config.json asks for {[out_features, in_features]}"
                )
        shape = (out_features, -(-in_features * bits // 32))
        codes = unpack_stream(
            read_as(tensors, f"{name}.weight_packed", shape, torch.int32), bits, in_features
        )
        scales = read_scales(tensors, f"{name}.weight_scale", (out_features, groups))
        zeros = torch.full((out_features, groups), 1 << (bits - 1), dtype=torch.int16)
        if not settings.is_symmetric:
            shape = (-(-out_features * bits // 32), groups)
            packed = read_as(tensors, f"{name}.weight_zero_point", shape, torch.int32)
            zeros = unpack_stream(packed.T, bits, out_features).short().T
        order = _order(tensors, name, groups, size)
        if order is not None:
            codes = codes.index_select(1, order)
        return QuantWeight(codes, scales, zeros, size, bits, order)


def _settings(group: object, where: str) -> WeightSettings:
    group = group if isinstance(group, Mapping) else {}
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise StartupError(f"{where} lacks weights or targets; it holds {sorted(group)}")
    if group.get("input_activations"):
        raise StartupError(f"{where}: quantised activations (input_activations) are not served")
    choice(weights, "type", ("int",), "int", where)
    strategy = choice(weights, "strategy", ("group", "channel"), "group", where)
    size = group_size_of({"group_size": weights.get("group_size") or -1}, "group_size", where)
    return WeightSettings(
        targets=tuple(map(str, targets)),
        bits=cast(int, choice(weights, "num_bits", (2, 3, 4, 5, 6, 7, 8), 4, where)),
        group_size=size if strategy == "group" else -1,
        is_symmetric=choice(weights, "symmetric", (True, False), True, where) is True,
    )


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
