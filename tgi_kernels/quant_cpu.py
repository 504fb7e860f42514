"""Weights of a few bits in the layout of the CPU kernels. csrc/quant/cpu_params.h says what lies where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels.quant_weight import QuantWeight, table

PANEL = 32  # output features that kernels work on together
RUN = 32  # codes of one feature that lie together
_NAN = 0x7F  # of e4m3, beside its sign
# Of scales of integers, which kernels multiply by powers of two up to 2⁹ either way: that shall round nothing.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


@dataclass(frozen=True)
class PackedCpu:
    """A weight in the layout of the CPU kernels; made by `pack_cpu`.

    weight = value of a code · scale + offset. shifts are offsets, or zeros: then offset = -zero · scale, and so it
    is with the one `zero` when there are no shifts.
    """

    words: Tensor  # int32 [panels, runs of 32 codes, bits, 32]
    scales: Tensor  # float32, float16 or bfloat16 [panels, groups, 32]
    shifts: Tensor | None  # the same
    has_zeros: bool
    zero: float
    table: Tensor | None  # float32 [16]
    is_e4m3: bool
    out_features: int
    in_features: int
    group_size: int
    order: Tensor | None


def fits_cpu(weight: QuantWeight) -> bool:
    """Whether `pack_cpu` takes it."""
    return _misfit(weight) is None


def pack_cpu(weight: QuantWeight) -> PackedCpu:
    """Lays a weight out for `quant_linear`. Raises ValueError for what `fits_cpu` refuses."""
    if (misfit := _misfit(weight)) is not None:
        raise ValueError(f"{misfit}; `dequantise` the weight")
    codes, bits, zeros, offsets = _shifted(weight)
    zero = 0.0
    if zeros is not None and torch.equal(zeros, zeros[:1, :1].expand_as(zeros)):
        zero = float(zeros[0, 0])
        zeros = None
    shifts = offsets if zeros is None else zeros.to(weight.scales.dtype)
    return PackedCpu(
        words=_words(codes, bits),
        scales=_panels(weight.scales),
        shifts=None if shifts is None else _panels(shifts),
        has_zeros=zeros is not None,
        zero=zero,
        table=None if weight.values in ("integer", "e4m3") else table(weight.values),
        is_e4m3=weight.values == "e4m3",
        out_features=weight.codes.shape[0],
        in_features=weight.codes.shape[1],
        group_size=weight.group_size,
        order=None if weight.order is None else weight.order.int(),
    )


def _misfit(weight: QuantWeight) -> str | None:
    """Why the kernels would not give a weight's exact bits; None: they do."""
    if weight.values == "e4m3":
        bad = int(((weight.codes & _NAN) == _NAN).sum())
        return f"{bad} of {weight.codes.numel()} codes are NaN" if bad else None
    if weight.values != "integer":
        return None
    sizes = weight.scales.abs()
    if bool(((sizes >= _SMALLEST) & (sizes <= _LARGEST) | (sizes == 0)).all()):
        return None
    return f"scales reach from {sizes.min():.3g} to {sizes.max():.3g}, past {_SMALLEST:.3g} or {_LARGEST:.3g}"


def _shifted(weight: QuantWeight) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
    """Codes, their bits, and zeros or offsets, such that -zero · scale is exact in float32.

    Where it is not, beside scales of more than 16 bits, codes less their zeros are kept in one bit more.
    """
    codes, zeros, offsets = weight.codes, weight.zeros, weight.offsets
    if offsets is not None and torch.equal(offsets.half().float(), offsets):
        offsets = offsets.half()
    if zeros is None or torch.equal(
        zeros.double() * weight.scales.double(), (zeros.float() * weight.scales.float()).double()
    ):
        return codes, weight.bits, zeros, offsets
    middle = 1 << weight.bits  # a power of two times a scale is exact
    spread = zeros.repeat_interleave(weight.group_size, 1)
    return codes.short() - spread + middle, weight.bits + 1, torch.full_like(zeros, middle), None


def _panels(values: Tensor) -> Tensor:
    """[out_features, ...] to [panels, ..., 32], zeros where the last panel has no feature."""
    missing = -len(values) % PANEL
    padded: Tensor = functional.pad(values, (0, 0) * (values.dim() - 1) + (0, missing))
    panels: Tensor = padded.unflatten(0, (-1, PANEL))
    return panels.movedim(1, -1).contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [out_features, in_features] to words [panels, runs, bits, 32]: a run's codes from its lowest bits on."""
    runs = functional.pad(codes, (0, -codes.shape[1] % RUN)).unflatten(1, (-1, RUN))
    words = torch.zeros((*runs.shape[:2], bits), dtype=torch.int32)
    for i in range(RUN):
        word, shift = divmod(i * bits, 32)
        code = runs[:, :, i].int()
        words[:, :, word] |= code << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= code >> (32 - shift)
    return _panels(words)
