"""GPTQ checkpoints whose config gives layers settings of their own, and the choice among GPTQ's packings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.gptq import Gptq
from tgi_server.quantization.marlin import Marlin
from tgi_server.quantization.scheme import Scheme, Section, Tensors, choice

_STORED: Final = ("bits", "group_size", "sym", "desc_act")
# What only the tool that quantised needed to know.
_PAST: Final = ("damp_percent", "damp_auto_increment", "mse", "static_groups", "true_sequential")


def gptq_scheme(section: Section, where: str) -> Scheme:
    """The packing that a `quantization_config` of GPTQ speaks of."""
    given = section.get("format") or ("marlin" if section.get("is_marlin_format") is True else "gptq")
    packing = choice(section, "checkpoint_format", ("gptq", "gptq_v2", "marlin"), given, where)
    rules = section.get("dynamic")
    if packing != "marlin":
        return GptqRules.from_section(section, where) if rules else Gptq.from_section(section, where)
    if rules:
        raise StartupError(
            f"{where}: `dynamic` gives layers settings of their own; marlin's packing has one for all"
        )
    return Marlin.from_section(section, where)


@dataclass(frozen=True)
class GptqRules:
    """`rules`: patterns of names, and settings of the matrices they match; None: those are dense. The first counts."""

    others: Gptq
    rules: tuple[tuple[re.Pattern[str], Gptq | None], ...]

    @classmethod
    def from_section(cls, section: Section, where: str) -> GptqRules:
        """`dynamic`: patterns, each after "+:" or nothing with settings to change, or after "-:" for dense matrices."""
        dynamic = section["dynamic"]
        if not isinstance(dynamic, Mapping):
            raise StartupError(f"{where}: dynamic is {dynamic!r}; an object of patterns is needed")
        rules = tuple(_rule(str(key), value, section, where) for key, value in dynamic.items())
        return cls(Gptq.from_section(section, where), rules)

    @property
    def title(self) -> str:
        own = {settings.title for _, settings in self.rules if settings is not None} - {self.others.title}
        return ", ".join([self.others.title, *sorted(title.removeprefix("gptq ") for title in own)])

    @property
    def leaf(self) -> str:
        return self.others.leaf

    def covers(self, tensors: Tensors, name: str) -> bool:
        is_there = self.others.covers(tensors, name)
        if is_there and self._of(name) is None:
            raise StartupError(
                f"{tensors.folder} holds {name}.{self.leaf}, but its config's `dynamic` says that {name} is not "
                "quantised; one of the two is wrong"
            )
        return is_there

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        settings = self._of(name) or self.others
        return settings.read(tensors, name, out_features, in_features)

    def _of(self, name: str) -> Gptq | None:
        return next((settings for pattern, settings in self.rules if pattern.match(name)), self.others)


def _rule(key: str, value: object, section: Section, where: str) -> tuple[re.Pattern[str], Gptq | None]:
    """One pattern with its settings."""
    try:
        pattern = re.compile(key.removeprefix("+:").removeprefix("-:"))
    except re.error as error:
        raise StartupError(f"{where}: dynamic has {key!r}, which is no pattern: {error}") from None
    if key.startswith("-:"):
        return pattern, None
    if not isinstance(value, Mapping) or (unknown := sorted(value.keys() - {*_STORED, *_PAST})):
        found = f"an unknown {unknown[0]!r}" if isinstance(value, Mapping) else repr(value)
        raise StartupError(f"{where}: dynamic has {found} for {key!r}; served are {', '.join(_STORED)}")
    return pattern, Gptq.from_section({**section, **value}, f"{where}: dynamic: {key}")
