"""Products in which both sides are float8 (e4m3), on Hopper GPUs: activations are rounded just before.

csrc/fp8/gemm.cuh sums 128 columns in the tensor cores and those sums in float32, in ascending order, so a token's bits
depend neither on the number of tokens nor on its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgi_kernels._check import check_alike, check_contiguous, check_dtype, check_shape
from tgi_kernels._library import ops, register_fakes
from tgi_kernels.activation import Gate
from tgi_kernels.hopper_matmul import GATES
from tgi_kernels.matmul import GATED
from tgi_kernels.quant_weight import QuantWeight

register_fakes("quantise_e4m3", "rms_norm_e4m3", "fp8_matmul")

BLOCK = 128  # rows and columns that share a scale, where not whole rows do
_VECTOR, _SCALES = 16, 4  # codes and scales in 16 bytes, of which rows are multiples
_MAX_NORM_COLUMNS = 32768  # of a row that one CTA keeps


@dataclass(frozen=True)
class PackedFp8:
    """A matrix as the kernels read it, and how its inputs are rounded; made by `pack_fp8`.

    codes: [out_features, in_features] uint8. scales: float32, [out_features], or a block each, [out_features / 128,
    ⌈in_features / 128⌉] filled up with zeros to whole vectors of 4: then inputs have a scale for 128 columns as well.
    input_scale: [1] float32, of all inputs; None: the largest number of a token, or of its block, becomes the largest
    of float8. Numbers above input_bound count as that.
    """

    codes: Tensor
    scales: Tensor
    in_blocks: bool
    input_scale: Tensor | None
    input_bound: float


@dataclass(frozen=True)
class Fp8Rows:
    """Activations that were rounded for a product, or for several that round alike.

    codes, scales: as `quantise_e4m3` returns them. dtype: of what was rounded, and of the products.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.codes)


def fits_fp8(weight: QuantWeight) -> bool:
    """Whether `pack_fp8` takes it: float8 on a Hopper GPU that asks for rounded inputs."""
    columns = weight.codes.shape[1]
    return (
        weight.inputs != "exact"
        and weight.values == "e4m3"
        and weight.offsets is None
        and weight.order is None
        and columns % _VECTOR == 0
        and weight.codes.is_cuda
        and torch.cuda.get_device_capability(weight.codes.device) == (9, 0)
        and (weight.scales.shape[1] == 1 if weight.inputs != "blocks" else _block_scales(weight) is not None)
    )


def pack_fp8(weight: QuantWeight) -> PackedFp8:
    """The matrix for `fp8_linear`. Raises ValueError for what `fits_fp8` says no to."""
    if not fits_fp8(weight):
        out_features, columns = weight.codes.shape
        raise ValueError(
            f"[{out_features}, {columns}] codes of kind {weight.values} in groups of {weight.group_size} on "
            f"{weight.codes.device}, inputs {weight.inputs}: the kernels take e4m3 on Hopper GPUs, {_VECTOR} columns "
            f"or multiples, with a scale a row or for blocks of {BLOCK}×{BLOCK}"
        )
    blocks = _block_scales(weight) if weight.inputs == "blocks" else None
    scales = weight.scales.float().squeeze(1) if blocks is None else blocks
    return PackedFp8(
        weight.codes.contiguous(),
        scales.contiguous(),
        blocks is not None,
        weight.input_scale,
        weight.input_bound,
    )


def fp8_linear(
    x: Tensor | Fp8Rows,
    packed: PackedFp8,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · weightᵀ + bias with x rounded to float8; then residual + y, or act(first half of y) · second half.

    x: [tokens, in_features], float16 or bfloat16, rows contiguous; or what `rms_norm_e4m3` made for this matrix.
    bias: [out_features]; residual: like y, may be out; both of x's dtype. out: [tokens, out_features], half as wide
    with a gate; allocated when not given. Returns out.
    """
    if gate is not None and packed.in_blocks and len(packed.codes) % (2 * BLOCK):
        return GATED[gate](fp8_linear(x, packed, bias), out)
    if isinstance(x, Tensor):
        rounded = quantise_e4m3(
            x, in_blocks=packed.in_blocks, fixed=packed.input_scale, bound=packed.input_bound
        )
        x = Fp8Rows(*rounded, x.dtype)
    return fp8_matmul(
        x.codes,
        x.scales,
        packed.codes,
        packed.scales,
        bias,
        dtype=x.dtype,
        in_blocks=packed.in_blocks,
        residual=residual,
        gate=gate,
        out=out,
    )


def quantise_e4m3(
    x: Tensor, *, in_blocks: bool = False, fixed: Tensor | None = None, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """x as codes and scales: x = codes · scales, as near as float8 is; values past ±448 scales become that.

    x: [tokens, columns], float16 or bfloat16 on a Hopper GPU; columns: a multiple of 16. fixed: [1] float32, the
    scale of all; else a scale a token, or with in_blocks one for each 128 columns, such that the largest number
    becomes 448; larger ones than `bound` count as that.
    Returns codes [tokens, columns] uint8 and scales float32, [tokens] or [tokens, ⌈columns / 128⌉], the rows of the
    latter filled up with zeros to whole vectors of 4.
    Raises ValueError for dtypes and shapes that do not fit.
    """
    check_shape("x", x, ("tokens", "columns"))
    check_dtype("x", x, torch.bfloat16, torch.float16)
    columns = x.shape[1]
    if columns % _VECTOR:
        raise ValueError(f"x has {columns} columns; a multiple of {_VECTOR} is needed")
    if not _in_vectors(x):
        x = x.clone(memory_format=torch.contiguous_format)  # the kernel reads 16 bytes at a time
    codes, scales = _empty_rows(x, in_blocks=in_blocks)
    ops.quantise_e4m3(x, fixed, bound, in_blocks, codes, scales)
    return codes, scales


def fits_rms_norm_e4m3(x: Tensor) -> bool:
    """Whether one kernel norms and rounds rows of x, which `fp8_linear` takes."""
    return x.shape[1] <= _MAX_NORM_COLUMNS and _in_vectors(x)


def rms_norm_e4m3(x: Tensor, weight: Tensor, eps: float, packed: PackedFp8) -> Fp8Rows:
    """What rounding `norm.rms_norm(x, weight, eps)` as `packed` asks for gives, bit for bit, without writing the norm.

    x: [tokens, hidden] of which `fits_rms_norm_e4m3` says yes. weight: [hidden], of x's dtype.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    check_shape("x", x, ("tokens", packed.codes.shape[1]))
    check_dtype("x", x, torch.bfloat16, torch.float16)
    check_shape("weight", weight, x.shape[1:])
    check_alike("weight", weight, "x", x)
    codes, scales = _empty_rows(x, in_blocks=packed.in_blocks)
    ops.rms_norm_e4m3(x, weight, eps, packed.input_scale, packed.input_bound, packed.in_blocks, codes, scales)
    return Fp8Rows(codes, scales, x.dtype)


def fp8_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    in_blocks: bool = False,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = (x · x_scales) · (weight · weight_scales)ᵀ + bias; then residual + y, or act(first half) · second half.

    x: [tokens, in_features], weight: [out_features, in_features]: codes of float8 as uint8, rows of whole 16 bytes.
    x_scales and weight_scales: float32, [tokens] and [out_features], or with in_blocks [tokens, ⌈in_features / 128⌉]
    and [out_features / 128, ⌈in_features / 128⌉], rows filled up with zeros to whole vectors of 4. bias, residual and
    out, of `dtype`, as in `fp8_linear`.
    Each step after the sums is rounded as the separate ops round it. Raises ValueError for what does not fit.
    """
    check_shape("x", x, ("tokens", "in_features"))
    check_shape("weight", weight, ("out_features", x.shape[1]))
    check_dtype("x", x, torch.uint8)
    check_alike("weight", weight, "x", x)
    check_contiguous("weight_scales", weight_scales)
    if gate is not None and residual is not None:
        raise ValueError(f"both a gate ({gate}) and a residual are given; a product takes one of the two")
    features = weight.shape[0] if gate is None else weight.shape[0] // 2
    if out is None:
        out = torch.empty((x.shape[0], features), dtype=dtype, device=x.device)
    epilogue = 0 if gate is None else GATES[gate]
    ops.fp8_matmul(x, x_scales, weight, weight_scales, in_blocks, bias, residual, epilogue, out)
    return out


def _in_vectors(x: Tensor) -> bool:
    """Whether rows are contiguous and start on 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1


def _empty_rows(x: Tensor, *, in_blocks: bool) -> tuple[Tensor, Tensor]:
    """Room for codes and scales of x."""
    tokens, columns = x.shape
    shape = (tokens, _filled(-(-columns // BLOCK))) if in_blocks else (tokens,)
    codes = torch.empty((tokens, columns), dtype=torch.uint8, device=x.device)
    return codes, torch.empty(shape, dtype=torch.float32, device=x.device)


def _block_scales(weight: QuantWeight) -> Tensor | None:
    """The scale of each block as `PackedFp8` has them; None if blocks have more than one."""
    rows, groups = weight.scales.shape
    if rows % BLOCK or (weight.group_size != BLOCK and groups > 1):
        return None
    blocks = weight.scales.float().view(-1, BLOCK, groups)
    first = blocks[:, :1]
    if not torch.equal(blocks, first.expand_as(blocks)):
        return None
    return functional.pad(first.squeeze(1), (0, _filled(groups) - groups))


def _filled(scales: int) -> int:
    """Of so many scales in a row, and the zeros that fill its last vector."""
    return -(-scales // _SCALES) * _SCALES
