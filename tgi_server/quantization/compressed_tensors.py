"""compressed-tensors checkpoints: whole numbers of 2 to 8 bits and floats of 8 and 4, each matrix as `targets` say.

Where a config rounds activations to 8 bits as well ("W8A8") so does the product of floats on Hopper GPUs, and that of
int8 on CPUs. Elsewhere they are left as they are, which is nearer to the model that was quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, cast

from tgi_kernels.quant_size import Inputs
from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.declared import inputs_of
from tgi_server.quantization.eight_bit import (
    Tile,
    block_of,
    read_e4m3,
    read_input_scale,
    read_integers,
)
from tgi_server.quantization.mxfp4 import GROUP, read_e2m1
from tgi_server.quantization.packed_integers import read_packed
from tgi_server.quantization.scheme import Section, Tensors, choice, group_size_of, replaces_weight
from tgi_server.quantization.targets import closeness, targets_of


class _Layout(NamedTuple):
    """What a format can hold: types, strategies and, by type, bits."""

    strategies: tuple[str, ...]
    bits: Mapping[str, tuple[int, ...]]


_BYTES: Final = ("tensor", "channel", "group", "block")
_INTEGERS: Final = (2, 3, 4, 5, 6, 7, 8)
LAYOUTS: Final = {
    "pack-quantized": _Layout(("group", "channel"), {"int": _INTEGERS}),
    "int-quantized": _Layout(_BYTES, {"int": _INTEGERS}),
    "float-quantized": _Layout(_BYTES, {"float": (8,)}),
    "naive-quantized": _Layout(_BYTES, {"int": _INTEGERS, "float": (8,)}),
    "mxfp4-pack-quantized": _Layout(("group",), {"float": (4,)}),
    "mxfp8-quantized": _Layout(("group",), {"float": (8,)}),
}
_MIXED: Final = "mixed-precision"  # each of config_groups has a format of its own


@dataclass(frozen=True)
class WeightSettings:
    """How the matrices that match `targets` are stored."""

    targets: tuple[str, ...]
    layout: str  # one of LAYOUTS
    kind: str  # "int" or "float"
    bits: int
    group_size: int  # columns that share a scale, -1 for all
    tile_rows: int  # rows that do, -1 for all
    is_symmetric: bool
    activations: str  # "", or what scales they are rounded with: "dynamic", "static"
    inputs: Inputs

    def tile(self, out_features: int, in_features: int) -> Tile:
        """Rows and columns that share a scale."""
        return (
            out_features if self.tile_rows == -1 else self.tile_rows,
            in_features if self.group_size == -1 else self.group_size,
        )


@dataclass(frozen=True)
class CompressedTensors:
    """The settings of a compressed-tensors checkpoint."""

    groups: tuple[WeightSettings, ...]
    ignored: tuple[str, ...]

    @classmethod
    def from_section(cls, section: Section, where: str) -> CompressedTensors:
        layout = choice(section, "format", (*LAYOUTS, _MIXED), "pack-quantized", where)
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise StartupError(f"{where}: config_groups is {groups!r}; an object of settings is needed")
        sparsity = section.get("sparsity_config")
        if isinstance(sparsity, Mapping):
            choice(sparsity, "format", ("dense",), "dense", f"{where}: sparsity_config")
        if section.get("transform_config"):
            raise StartupError(f"{where}: transform_config rotates activations, which is not served")
        return cls(
            tuple(_settings(group, layout, f"{where}: {name}") for name, group in groups.items()),
            targets_of(section.get("ignore") or [], f"{where}: ignore"),
        )

    @property
    def title(self) -> str:
        integers = sorted({group.bits for group in self.groups if group.kind == "int"})
        floats = sorted({group.bits for group in self.groups if group.kind == "float"})
        kinds = [f"{', '.join(map(str, integers))} bit"] if integers else []
        kinds += [f"fp{bits}" for bits in floats]
        return f"compressed-tensors {', '.join(kinds)}"

    @property
    def leaf(self) -> str:
        return "weight_scale"

    def covers(self, tensors: Tensors, name: str) -> bool:
        if replaces_weight("weight_packed", tensors, name):
            return True
        return f"{name}.weight_scale" in tensors.names()

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        where, shape = f"{tensors.folder}: {name}", (out_features, in_features)
        settings = max(self.groups, key=lambda group: closeness(name, group.targets))
        if not closeness(name, settings.targets) or closeness(name, self.ignored):
            how = "has it under `ignore`" if closeness(name, self.ignored) else "has no target for it"
            raise StartupError(f"{where} has a weight_scale, but config_groups of its config {how}")
        weight = _read_weight(tensors, name, settings, shape)
        if not settings.activations:
            return weight
        is_static = settings.activations == "static"
        stored = read_input_scale(tensors, name, needed=is_static)
        return replace(weight, inputs=settings.inputs, input_scale=stored if is_static else None)


def _read_weight(
    tensors: Tensors, name: str, settings: WeightSettings, shape: tuple[int, int]
) -> QuantWeight:
    """Matrix `name` of so many rows and columns as it is stored."""
    tile, symmetric = settings.tile(*shape), settings.is_symmetric
    if settings.layout == "pack-quantized":
        return read_packed(tensors, name, settings.bits, settings.group_size, *shape, symmetric=symmetric)
    if settings.layout == "mxfp4-pack-quantized":
        return read_e2m1(tensors, name, *shape)
    if settings.kind == "float":
        return read_e4m3(tensors, name, tile, f"{name}.weight_scale", *shape)
    zero_point = None if symmetric else f"{name}.weight_zero_point"
    return read_integers(tensors, name, tile, settings.bits, *shape, zero_point)


def _settings(group: object, default_layout: object, where: str) -> WeightSettings:
    group = group if isinstance(group, Mapping) else {}
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise StartupError(f"{where} lacks weights or targets; it holds {sorted(group)}")
    name = str(choice({"format": group.get("format") or default_layout}, "format", tuple(LAYOUTS), "", where))
    layout = LAYOUTS[name]
    kind = str(choice(weights, "type", tuple(layout.bits), "int", f"{where}: {name}"))
    bits = cast(int, choice(weights, "num_bits", layout.bits[kind], 8, f"{where}: {name}"))
    size = group_size_of({"group_size": weights.get("group_size") or -1}, "group_size", where)
    named = {"strategy": weights.get("strategy") or _strategy_of(weights.get("group_size"))}
    strategy = choice(named, "strategy", layout.strategies, "", f"{where}: {name}")
    rows, columns = (-1 if strategy == "tensor" else 1), (size if strategy == "group" else -1)
    if strategy == "block":
        block = block_of(weights, "block_structure", where)
        if block is None:
            raise StartupError(f"{where}: strategy is 'block', but there is no block_structure")
        rows, columns = block
    if name != "pack-quantized":
        choice(weights, "actorder", (None, "weight", "static"), None, f"{where}: {name}")
    if name.startswith("mx"):
        choice(weights, "group_size", (GROUP,), GROUP, f"{where}: {name}")
    return WeightSettings(
        targets=targets_of(targets, f"{where}: targets"),
        layout=name,
        kind=kind,
        bits=bits,
        group_size=columns,
        tile_rows=rows,
        is_symmetric=choice(weights, "symmetric", (True, False), True, where) is True,
        activations=_activations(group, bits, where),
        inputs=inputs_of(group.get("input_activations"), kind, columns),
    )


def _strategy_of(group_size: object) -> str:
    """What a config means that names none."""
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def _activations(group: Mapping[str, object], bits: int, where: str) -> str:
    """ "", or how the format finds the scales of activations: "dynamic" or "static"."""
    if group.get("output_activations"):
        raise StartupError(f"{where}: output_activations are not served")
    inputs = group.get("input_activations")
    if not inputs:
        return ""
    if not isinstance(inputs, Mapping) or inputs.get("num_bits", 8) != 8 or bits != 8:
        given = inputs.get("num_bits", 8) if isinstance(inputs, Mapping) else inputs
        raise StartupError(
            f"{where}: weights of {bits} bits beside input_activations of {given!r} (W{bits}A{given}) are not served; "
            "8 beside 8 are, and weights alone"
        )
    return "dynamic" if inputs.get("dynamic", False) is not False else "static"
