"""What headers and config say of a checkpoint's matrices, for plans and for made-up weights. Knows no torch.

Formats check what they read; here nothing is checked, and what is not understood is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd, prod
from pathlib import Path
from typing import Final

from tgi_kernels.quant_size import QuantKind
from tgi_server.checkpoint.headers import Entry
from tgi_server.quantization.declared import DECLARED, GGUF, ON_LOAD
from tgi_server.quantization.section import find_section

# The tensors of a matrix's codes and of its scales.
_STORED_AS: Final = (
    ("qweight", "scales"),
    ("B", "s"),
    ("weight_packed", "weight_scale"),
    ("weight", "weight_scale"),
    ("weight", "weight_scale_inv"),
    ("weight", "weight.absmax"),
    ("weight", "SCB"),
    ("q_weight", "q_scale"),
)
_DENSE: Final = ("BF16", "F16", "F32")
_EXL2_ROWS: Final = 32  # that a matrix is filled up to multiples of


@dataclass(frozen=True)
class Contents:
    """Tensors by name, none if there are no files yet; the format that the config names, None for a dense checkpoint.

    declared: what the config says of all quantised matrices; None also for a format that is not known here. For a
    dense checkpoint, what its blocks' matrices become while they load.
    """

    tensors: Mapping[str, Entry] = field(default_factory=dict)
    method: str | None = None
    declared: QuantKind | None = None

    @property
    def are_known(self) -> bool:
        """Whether sizes can be told from it."""
        return self.method is None or self.declared is not None

    def dtype(self, name: str, default: str) -> str:
        """The type a tensor is stored in, such as "BF16"; "" for one of codes."""
        entry = self.tensors.get(name)
        return default if entry is None else entry.dtype if entry.dtype in _DENSE else ""

    def kind(self, name: str, rows: int, columns: int) -> QuantKind | None:
        """Of matrix `name` (without ".weight") with so many rows and columns; None if it is dense."""
        if self.declared is None:
            return None
        if not self.tensors or self.method is None:
            return fitted(self.declared, columns) if name.endswith("_proj") else None
        weight = self.tensors.get(f"{name}.weight")
        if weight is not None and weight.dtype in GGUF:
            return GGUF[weight.dtype]
        for leaves in _STORED_AS:
            codes, scales = (self.tensors.get(f"{name}.{leaf}") for leaf in leaves)
            if codes is not None and scales is not None and codes.dtype not in _DENSE:
                found = _stored(self.declared, leaves[1], codes, scales, (rows, columns))
                is_shifted = f"{name}.weight_zero_point" in self.tensors
                return replace(found, zeros="many") if is_shifted else found
        return None


def contents_of(
    config: Mapping[str, object], folder: Path, tensors: Mapping[str, Entry], quantize: str = ""
) -> Contents:
    """Of the checkpoint in `folder` whose config.json is `config` and whose tensors are `tensors`, if known.

    quantize: the option, which a checkpoint that is quantised needs not.
    """
    found = find_section(config, folder)
    if found is None:
        return Contents(tensors, None, ON_LOAD.get(quantize))
    method = str(found.method)
    declare = DECLARED.get(method)
    return Contents(tensors, method, None if declare is None else declare(found.section))


def fitted(kind: QuantKind, columns: int) -> QuantKind:
    """The kind in a matrix of so many columns: blocks of floats that do not divide them become groups that do."""
    if kind.values == "integer" or kind.group_size == -1:
        return kind
    return replace(kind, group_size=-1 if kind.group_size >= columns else gcd(kind.group_size, columns))


def _stored(
    declared: QuantKind, scales_leaf: str, codes: Entry, scales: Entry, shape: tuple[int, int]
) -> QuantKind:
    """What the tensors of codes and scales of a matrix are. shape: its rows and columns."""
    rows, columns = shape
    code_bytes = codes.end - codes.begin
    if scales_leaf == "q_scale":
        filled = -(-rows // _EXL2_ROWS) * _EXL2_ROWS
        bits = 8 * code_bytes / (filled * columns)
        return replace(declared, bits=bits, group_size=columns // scales.shape[0], is_ordered=True)
    if scales_leaf in ("weight.absmax", "SCB"):
        return fitted(declared, columns)
    if codes.dtype in ("F8_E4M3", "I8"):
        return _of_bytes(declared, codes, scales, columns)
    groups = max(1, prod(scales.shape) // rows)
    return replace(declared, bits=8 * code_bytes // (rows * columns), group_size=columns // groups)


def _of_bytes(declared: QuantKind, codes: Entry, scales: Entry, columns: int) -> QuantKind:
    """Of codes of a byte each, whose scales may be fewer than rows."""
    tiles = scales.shape[-1] if len(scales.shape) > 1 else 1
    size = -1 if tiles == 1 else columns // tiles if declared.group_size == -1 else declared.group_size
    if codes.dtype == "F8_E4M3":
        found = QuantKind(8, size, "e4m3", zeros="none", scale_bytes=4, inputs=declared.inputs)
        return fitted(found, columns)
    return QuantKind(8, size, scale_bytes=4 if scales.dtype == "F32" else 2, inputs=declared.inputs)


KNOWN_FORMATS: Final = tuple(DECLARED)
