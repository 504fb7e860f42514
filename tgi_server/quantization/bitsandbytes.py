"""bitsandbytes checkpoints: NF4, FP4 and LLM.int8. Dettmers et al. 2023, arXiv:2305.14314; 2022, arXiv:2208.07339.

4 bits. For a matrix of n = out · in numbers: weight [n / 2, 1], two codes a byte, the first in its high bits;
weight.absmax float32 [⌈n / blocksize⌉], the scale of each block of numbers, wherever rows end; weight.quant_map float32
[16], what the codes stand for; weight.quant_state.bitsandbytes__nf4 (or fp4), a JSON object as bytes: quant_type,
blocksize, shape. With double quantisation weight.absmax is uint8, and a scale is weight.nested_quant_map[code] ·
weight.nested_absmax[block of nested_blocksize scales] + nested_offset, each step rounded to float32.

8 bits: weight int8 [out, in]; SCB float32 [out], 127 times the scale of a row; weight_format uint8, 0 for rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight, table
from tgi_server.errors import StartupError
from tgi_server.quantization.scheme import Scheme, Section, Tensors, choice, read_as

Kind = Literal["nf4", "fp4"]
BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE: Final = "weight.quant_state.bitsandbytes__"
_STORAGE: Final = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_MOST_STATE_BYTES: Final = 1 << 16
_MAP_TOLERANCE: Final = 1e-6  # kernels of other programs use tables of their own, rounded here and there


def bitsandbytes(section: Section, where: str) -> Scheme:
    """What `load_in_4bit` or `load_in_8bit` of a config asks for."""
    four, eight = (
        choice(section, key, (True, False), section.get(f"_{key}") is True, where)
        for key in ("load_in_4bit", "load_in_8bit")
    )
    if four == eight:
        raise StartupError(
            f"{where}: load_in_4bit is {four} and load_in_8bit is {eight}; one of the two has to be true"
        )
    skipped = section.get("llm_int8_skip_modules") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise StartupError(
            f"{where}: llm_int8_skip_modules is {skipped!r}; a list of modules' names is needed"
        )
    if eight:
        choice(section, "llm_int8_has_fp16_weight", (False,), False, where)
        return EightBit(tuple(skipped))
    storage = section.get("bnb_4bit_quant_storage") or "uint8"
    return FourBit(
        cast(Kind, choice(section, "bnb_4bit_quant_type", ("fp4", "nf4"), "fp4", where)),
        choice(section, "bnb_4bit_use_double_quant", (True, False), False, where) is True,
        str(choice({"bnb_4bit_quant_storage": storage}, "bnb_4bit_quant_storage", (*_STORAGE,), "", where)),
        tuple(skipped),
    )


@dataclass(frozen=True)
class FourBit:
    """The settings of a checkpoint of 4 bits. storage: the type that bytes of codes are called."""

    kind: Kind
    is_double: bool
    storage: str = "uint8"
    skipped: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"bitsandbytes {self.kind}{' double' if self.is_double else ''}"

    @property
    def leaf(self) -> str:
        return "weight.absmax"

    def covers(self, tensors: Tensors, name: str) -> bool:
        leaves = ("weight.absmax", "weight.quant_map", f"{STATE}nf4", f"{STATE}fp4")
        return _covered(tensors, name, leaves, self.skipped)

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        where, count = f"{tensors.folder}: {name}", out_features * in_features
        state = _State.read(tensors, name, self.kind, [out_features, in_features])
        size = math.gcd(in_features, state.block)
        if size % 8 and size != in_features:
            raise StartupError(
                f"{where} has {in_features} columns in blocks of {state.block} numbers: no block's end within a row is "
                "at a multiple of 8 columns. Quantise the model with a blocksize that fits its rows"
            )
        self._check_map(tensors, name)
        scales = self._scales(tensors, name, state, count)
        of_group = torch.arange(count // size) * size // state.block
        codes = self._codes(tensors, name, count).view(out_features, in_features)
        return QuantWeight(codes, scales[of_group].view(out_features, -1), None, size, 4, values=self.kind)

    def _codes(self, tensors: Tensors, name: str, count: int) -> Tensor:
        """[count] uint8."""
        dtype = _STORAGE[self.storage]
        if count % (2 * dtype.itemsize):
            raise StartupError(
                f"{tensors.folder}: {name} has {count} numbers, which do not fill {self.storage}s two a byte"
            )
        packed = read_as(tensors, f"{name}.weight", (count // 2 // dtype.itemsize, 1), dtype)
        pairs = packed.contiguous().view(torch.uint8).flatten()
        return torch.stack([pairs >> 4, pairs & 15], 1).flatten()

    def _check_map(self, tensors: Tensors, name: str) -> None:
        """Raises StartupError if codes stand for other numbers than those of this kind."""
        found, own = read_as(tensors, f"{name}.weight.quant_map", (16,), torch.float32), table(self.kind)
        far = ~((found - own).abs() <= _MAP_TOLERANCE)
        if far.any():
            code = int(far.nonzero()[0])
            raise StartupError(
                f"{tensors.folder}: {name}.weight.quant_map is not that of {self.kind}: code {code} stands for "
                f"{float(found[code]):.6g}, not {float(own[code]):.6g}; other tables are not served"
            )

    def _scales(self, tensors: Tensors, name: str, state: _State, count: int) -> Tensor:
        """Of each block, [blocks] float32."""
        leaf = f"{name}.weight.absmax"
        blocks = -(-count // state.block)
        nested = f"{name}.weight.nested_absmax" in tensors.names()
        if nested != self.is_double:
            raise StartupError(
                f"{tensors.folder}: config says bnb_4bit_use_double_quant is {self.is_double}, but "
                f"{name}.weight.nested_absmax is {'there' if nested else 'missing'}; one of the two is wrong"
            )
        if not nested:
            return _checked(tensors, leaf, read_as(tensors, leaf, (blocks,), torch.float32))
        codes = read_as(tensors, leaf, (blocks,), torch.uint8)
        values = read_as(tensors, f"{name}.weight.nested_quant_map", (256,), torch.float32)
        per_scale = -(-blocks // state.nested_block)
        of_block = read_as(tensors, f"{name}.weight.nested_absmax", (per_scale,), torch.float32)
        spread = of_block.repeat_interleave(state.nested_block)[:blocks]
        return _checked(tensors, leaf, values[codes.long()] * spread + torch.tensor(state.nested_offset))


@dataclass(frozen=True)
class EightBit:
    """The settings of an LLM.int8 checkpoint."""

    skipped: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return "bitsandbytes int8"

    @property
    def leaf(self) -> str:
        return "SCB"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return _covered(tensors, name, ("SCB", "weight_format"), self.skipped)

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        signed = read_as(tensors, f"{name}.weight", (out_features, in_features), torch.int8)
        largest = read_as(tensors, f"{name}.SCB", (out_features,), torch.float32)
        if bool((largest < 0).any()):
            raise StartupError(
                f"{tensors.folder}: {int((largest < 0).sum())} of {out_features} numbers in {name}.SCB are below zero; "
                "they are the largest of each row"
            )
        _checked(tensors, f"{name}.SCB", largest)
        leaf = f"{name}.weight_format"
        if leaf in tensors.names():
            order = tensors.read(leaf, tensors.shape(leaf))
            if order.numel() != 1 or int(order) != 0:
                raise StartupError(
                    f"{tensors.folder}: {leaf} is {order.tolist()}; 0 is served, weights in rows. Save the model again "
                    "with bitsandbytes 0.45 or newer"
                )
        codes = signed.contiguous().view(torch.uint8) ^ 128  # two's complement plus 128
        scales = (largest.double() / 127).float().unsqueeze(1)
        zeros = torch.full((out_features, 1), 128, dtype=torch.int16)
        return QuantWeight(codes, scales, zeros, in_features, 8)


@dataclass(frozen=True)
class _State:
    """What the quant_state of a matrix says: numbers in a block, scales in a nested block, added to all of those."""

    block: int
    nested_block: int
    nested_offset: float

    @classmethod
    def read(cls, tensors: Tensors, name: str, kind: Kind, shape: list[int]) -> _State:
        """Raises StartupError for what it lacks, and where it contradicts the config or `shape`."""
        leaf = f"{name}.{STATE}{kind}"
        other = f"{name}.{STATE}{'fp4' if kind == 'nf4' else 'nf4'}"
        if other in tensors.names():
            raise StartupError(
                f"{tensors.folder}: config says bnb_4bit_quant_type is {kind}, but there is {other}; one of the two "
                "is wrong"
            )
        where = f"{tensors.folder}: {leaf}"
        state = _json(tensors, leaf, where)
        choice(state, "quant_type", (kind,), "", where)
        if state.get("shape") != shape:
            raise StartupError(f"{where}: shape is {state.get('shape')!r}; config.json asks for {shape}")
        offset = state.get("nested_offset", 0.0)
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise StartupError(f"{where}: nested_offset is {offset!r}; a number is needed")
        block = choice(state, "blocksize", BLOCK_SIZES, 0, where)
        nested_block = choice(state, "nested_blocksize", BLOCK_SIZES, 256, where)
        return cls(cast(int, block), cast(int, nested_block), offset)


def _json(tensors: Tensors, leaf: str, where: str) -> dict[str, Any]:
    """The object that a tensor of bytes spells."""
    if leaf not in tensors.names():
        raise StartupError(f"{where} is missing; it holds the size of the blocks")
    shape = tensors.shape(leaf)
    if len(shape) != 1 or shape[0] > _MOST_STATE_BYTES:
        raise StartupError(
            f"{where} has shape {shape}; a line of at most {_MOST_STATE_BYTES} bytes is needed"
        )
    try:
        value = json.loads(bytes(read_as(tensors, leaf, shape, torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{where} holds a {type(value).__name__}, not a JSON object")
    return value


def _checked(tensors: Tensors, leaf: str, scales: Tensor) -> Tensor:
    """Raises StartupError for NaN, infinity and all zeros."""
    if bad := int((~scales.isfinite()).sum()):
        raise StartupError(
            f"{tensors.folder}: {bad} of {scales.numel()} scales in {leaf} are NaN or infinite; "
            "quantise the model again"
        )
    if not scales.any():
        raise StartupError(
            f"{tensors.folder}: all {scales.numel()} scales in {leaf} are zero; quantise the model again"
        )
    return scales


def _covered(tensors: Tensors, name: str, leaves: tuple[str, ...], skipped: tuple[str, ...]) -> bool:
    """Whether matrix `name` has one of `leaves` beside it. Raises StartupError if it is skipped, too."""
    leaf = next((leaf for leaf in leaves if f"{name}.{leaf}" in tensors.names()), None)
    if leaf is None:
        return False
    for module in skipped:
        if f".{name}.".startswith(f".{module}.") or f".{name}".endswith(f".{module}"):
            raise StartupError(
                f"{tensors.folder}: llm_int8_skip_modules has {module!r}, but there is {name}.{leaf}; a matrix that is "
                "skipped is dense. One of the two is wrong"
            )
    return True
