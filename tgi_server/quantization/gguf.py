"""GGUF's own quantisations, in the file they came in."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.checkpoint.gguf_blocks import DECODERS, weight_of_blocks
from tgi_server.checkpoint.gguf_file import KINDS
from tgi_server.checkpoint.gguf_model import BLOCKS
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import Section, Tensors

_SIZES = {kind.name: (kind.values, kind.size_bytes) for kind in KINDS.values()}


@dataclass(frozen=True)
class Gguf:
    """The types of a file's quantised matrices; each matrix says its own in its name."""

    types: tuple[str, ...]

    @classmethod
    def from_section(cls, section: Section, where: str) -> Gguf:
        types = section.get("types")
        if not isinstance(types, list) or not all(name in DECODERS for name in types):
            raise StartupError(f"{where}: types is {types!r}; a list of {', '.join(DECODERS)} is needed")
        return cls(tuple(types))

    @property
    def title(self) -> str:
        return " ".join(["gguf", *self.types])

    @property
    def leaf(self) -> str:
        return BLOCKS

    def covers(self, tensors: Tensors, name: str) -> bool:
        return self._type(tensors, name) is not None

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        kind = self._type(tensors, name)
        if kind is None:
            raise StartupError(f"{tensors.folder}: {name} is not quantised as {self.title}")
        values, size_bytes = _SIZES[kind]
        if in_features % values:
            raise StartupError(
                f"{tensors.folder}: {name} has {in_features} columns; {kind} has blocks of {values}"
            )
        shape = (out_features, in_features // values, size_bytes)
        blocks = tensors.read(f"{name}.{kind.lower()}.{BLOCKS}", shape)
        return weight_of_blocks(kind, blocks, f"{tensors.folder}: {name}")

    def _type(self, tensors: Tensors, name: str) -> str | None:
        names = tensors.names()
        return next((kind for kind in self.types if f"{name}.{kind.lower()}.{BLOCKS}" in names), None)
