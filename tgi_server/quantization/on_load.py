"""`--quantize`: dense checkpoints whose matrices get fewer bits while they load."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tgi_kernels.quant_weight import QuantWeight, table
from tgi_server.errors import StartupError
from tgi_server.quantization.bitsandbytes import Kind
from tgi_server.quantization.byte_codes import nearest_e4m3
from tgi_server.quantization.rounding import nearest_codes, round_rows
from tgi_server.quantization.scheme import Scheme, Tensors, read_as

_BLOCK: Final = 64  # numbers that share a scale, as in bitsandbytes
_IN_LAYER: Final = re.compile(r"\blayers\.\d+\.")
# What the titles of a checkpoint's own format begin with, where the option's name is another.
_TITLES: Final = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes-nf4": "bitsandbytes nf4",
    "bitsandbytes-fp4": "bitsandbytes fp4",
    "marlin": "gptq",
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
}


@dataclass(frozen=True)
class OnLoad:
    """Every matrix of the blocks by the same rule; the head stays as it is."""

    title: str
    quantise: Callable[[Tensor], QuantWeight]  # of [out, in] float32

    @property
    def leaf(self) -> str:
        return "weight"

    def covers(self, _tensors: Tensors, name: str) -> bool:
        return _IN_LAYER.search(name) is not None

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        shape = (out_features, in_features)
        weight = read_as(tensors, f"{name}.weight", shape, torch.bfloat16, torch.float16, torch.float32)
        if bad := int((~weight.isfinite()).sum()):
            raise StartupError(
                f"{tensors.folder}: {bad} of {weight.numel()} numbers in {name}.weight are NaN or infinite; they "
                "cannot be quantised"
            )
        try:
            return self.quantise(weight.float())
        except ValueError as error:
            raise StartupError(f"{tensors.folder}: {name}: {error}; leave --quantize out") from None


def chosen_scheme(asked: str, own: Scheme | None, folder: Path) -> Scheme:
    """What `--quantize asked` means for a checkpoint in format `own`: that format, or one to make while loading.

    Raises StartupError if the checkpoint is in another format, or dense and asked for one that is not made here.
    """
    if own is not None:
        begins = _TITLES.get(asked, asked)
        if f"{own.title} ".startswith(f"{begins} "):
            return own
        raise StartupError(
            f"--quantize {asked}: {folder} is quantised already, as {own.title}; leave the option out, a checkpoint's "
            "config says how it is quantised"
        )
    if asked in ON_LOAD:
        return ON_LOAD[asked]
    raise StartupError(
        f"--quantize {asked}: {folder} is not quantised, and such codes are not made while loading: give a "
        f"checkpoint that is ({asked}), make one with `tgi-server quantize`, or choose {', '.join(ON_LOAD)}"
    )


def _four_bits(kind: Kind) -> Callable[[Tensor], QuantWeight]:
    def quantise(weight: Tensor) -> QuantWeight:
        out_features, in_features = weight.shape
        size = math.gcd(in_features, _BLOCK)
        if size % 8:
            raise ValueError(f"{in_features} columns are no multiple of 8")
        blocks = weight.reshape(-1, size)
        scales = blocks.abs().amax(1)
        codes = nearest_codes(blocks, scales, table(kind))
        return QuantWeight(codes.view_as(weight), scales.view(out_features, -1), None, size, 4, values=kind)

    return quantise


ON_LOAD: Final[Mapping[str, Scheme]] = {
    "bitsandbytes": OnLoad("int8 by rows", round_rows),
    "bitsandbytes-nf4": OnLoad("nf4 g64", _four_bits("nf4")),
    "bitsandbytes-fp4": OnLoad("fp4 g64", _four_bits("fp4")),
    "eetq": OnLoad("int8 by rows", round_rows),
    "fp8": OnLoad("fp8 by rows", nearest_e4m3),
}
