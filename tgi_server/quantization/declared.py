"""What the config of a quantised checkpoint says of all its matrices, by format. Knows no torch and checks nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from tgi_kernels.quant_size import Inputs, QuantKind

Section = Mapping[str, object]

# GGUF's types of blocks.
GGUF: Final = {
    "Q4_0": QuantKind(4, 32),
    "Q4_1": QuantKind(4, 32, zeros="none", offset_bytes=2),
    "Q5_0": QuantKind(5, 32),
    "Q5_1": QuantKind(5, 32, zeros="none", offset_bytes=2),
    "Q8_0": QuantKind(8, 32),
    "Q2_K": QuantKind(2, 16, zeros="none", scale_bytes=4, offset_bytes=4),
    "Q3_K": QuantKind(3, 16, scale_bytes=4),
    "Q4_K": QuantKind(4, 32, zeros="none", scale_bytes=4, offset_bytes=4),
    "Q5_K": QuantKind(5, 32, zeros="none", scale_bytes=4, offset_bytes=4),
    "Q6_K": QuantKind(6, 16, scale_bytes=4),
}
_NF4: Final = QuantKind(4, 64, "nf4", zeros="none", scale_bytes=4)
_FP4: Final = QuantKind(4, 64, "fp4", zeros="none", scale_bytes=4)
# What `--quantize` makes of a dense checkpoint while it loads.
ON_LOAD: Final = {
    "bitsandbytes": QuantKind(8, -1),
    "bitsandbytes-nf4": _NF4,
    "bitsandbytes-fp4": _FP4,
    "eetq": QuantKind(8, -1),
    "fp8": QuantKind(8, -1, "e4m3", zeros="none", scale_bytes=4, inputs="rows"),
}


def _gptq(section: Section) -> QuantKind | None:
    return _integers(
        section.get("bits", 4),
        section.get("group_size", -1),
        has_zeros=section.get("sym", True) is not True,
        is_ordered=section.get("desc_act") is True,
    )


def _awq(section: Section) -> QuantKind | None:
    size = section.get("group_size", section.get("q_group_size", -1))
    return _integers(section.get("bits", section.get("w_bit", 4)), size, has_zeros=True)


def _compressed_tensors(section: Section) -> QuantKind | None:
    """Of the first group of settings: without headers it is not known which matrix is of which."""
    groups = section.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    if weights.get("type") == "float":
        rounds = bool(first.get("input_activations")) if isinstance(first, Mapping) else False
        block = weights.get("block_structure")
        return _e4m3(block, rounds_inputs=rounds) if weights.get("num_bits") == 8 else None
    size = weights.get("group_size") or -1
    found = _integers(weights.get("num_bits", 4), size, has_zeros=weights.get("symmetric", True) is not True)
    activations = first.get("input_activations") if isinstance(first, Mapping) else None
    return None if found is None else replace(found, inputs=inputs_of(activations, "int", size))


def inputs_of(activations: object, kind: str, group_size: object) -> Inputs:
    """How a compressed-tensors config rounds what it multiplies with matrices of `kind`, "int" or "float".

    With scales as fine as those of weights are: of tokens where a config means all tokens of a batch.
    """
    if not activations or not isinstance(activations, Mapping):
        return "exact"
    is_plain = activations.get("symmetric", True) is True
    if kind == "int" and not (is_plain and activations.get("strategy", "token") in ("token", "tensor")):
        return "other"
    return "rows" if group_size == -1 else "blocks"


def _bitsandbytes(section: Section) -> QuantKind | None:
    if section.get("load_in_8bit") is True:
        return QuantKind(8, -1, scale_bytes=4)
    return _NF4 if section.get("bnb_4bit_quant_type", "fp4") == "nf4" else _FP4


def _fp8(section: Section) -> QuantKind | None:
    return _e4m3(section.get("weight_block_size"), rounds_inputs=True)


def _exl2(section: Section) -> QuantKind | None:
    """The mean says nothing of scales, but counts them."""
    bits = section.get("bits")
    return QuantKind(float(bits), -1, is_mixed=True) if isinstance(bits, (int, float)) else None


def _gguf(section: Section) -> QuantKind | None:
    types = section.get("types")
    return GGUF.get(str(types[0])) if isinstance(types, list) and types else None


def _e4m3(block: object, *, rounds_inputs: bool) -> QuantKind:
    """block: rows and columns, if it is a list."""
    given = block[1] if isinstance(block, list) and len(block) == 2 else -1
    size = given if type(given) is int else -1
    inputs: Inputs = "exact" if not rounds_inputs else "rows" if size == -1 else "blocks"
    return QuantKind(8, size, "e4m3", zeros="none", scale_bytes=4, inputs=inputs)


def _integers(
    bits: object, group_size: object, *, has_zeros: bool, is_ordered: bool = False
) -> QuantKind | None:
    """Whole numbers with scales of 16 bits."""
    if bits not in range(2, 9) or not isinstance(group_size, int) or group_size < -1 or group_size == 0:
        return None
    return QuantKind(int(str(bits)), group_size, zeros="many" if has_zeros else "one", is_ordered=is_ordered)


# `quant_method` of a config → what it says.
DECLARED: Final[Mapping[str, Callable[[Section], QuantKind | None]]] = {
    "gptq": _gptq,
    "marlin": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _fp8,
    "exl2": _exl2,
    "gguf": _gguf,
}
