"""The oracle of float8 by float8 against float64 arithmetic, and which matrices the GPU's product takes."""

from __future__ import annotations

import pytest
import torch

from tgi_kernels.fp8 import PackedFp8, fits_fp8, fits_rms_norm_e4m3, fp8_linear, rms_norm_e4m3
from tgi_kernels.quant_weight import QuantWeight, some_rows, stack
from tgi_kernels.reference import fp8 as reference


@pytest.mark.parametrize("in_blocks", [False, True])
def test_the_largest_number_of_a_token_or_block_becomes_the_largest_of_float8(in_blocks: bool) -> None:
    x = torch.randn(5, 300).double()
    codes, scales = reference.quantise_e4m3(x, in_blocks=in_blocks)
    values = codes.view(torch.float8_e4m3fn).float()
    assert values.abs().amax() == reference.LARGEST
    if in_blocks:
        wide = reference.widen_blocks(codes, scales, rows=1)
        assert (values[:, :128].abs().amax(1) == reference.LARGEST).all()
        assert scales.shape == (5, 3)
    else:
        wide = reference.widen_rows(codes, scales)
        assert (values.abs().amax(1) == reference.LARGEST).all()
    # Half a step of three bits, and half of the smallest step at the bottom.
    assert ((wide - x).abs() <= x.abs() / 16 + 2.0**-10 * float(scales.max())).all()


def test_a_fixed_scale_and_a_bound_cut_what_is_larger() -> None:
    x = torch.tensor([[1.0, -1000.0, 3.0]])
    codes, scales = reference.quantise_e4m3(x, fixed=0.5)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [[2.0, -448.0, 6.0]]
    assert scales.tolist() == [0.5]
    assert reference.quantise_e4m3(x, bound=448.0)[0].view(torch.float8_e4m3fn).float().tolist() == [
        [1.0, -448.0, 3.0]
    ]


def test_stored_scales_of_inputs_join_as_the_largest_and_stay_with_a_part() -> None:
    def weight(scale: float) -> QuantWeight:
        return QuantWeight(
            torch.zeros(8, 16, dtype=torch.uint8),
            torch.ones(8, 1),
            None,
            16,
            8,
            values="e4m3",
            inputs="rows",
            input_scale=torch.tensor([scale]),
        )

    both = stack([weight(0.5), weight(2.0)])
    assert both.codes.shape == (16, 16)
    assert both.input_scale is not None
    assert both.input_scale.tolist() == [2.0]
    part = some_rows(both, 0, 4)
    assert part.input_scale is both.input_scale
    assert not fits_fp8(both)  # on a CPU


@pytest.mark.parametrize(("in_blocks", "scales"), [(False, (5,)), (True, (5, 8))])
def test_a_norm_that_rounds_makes_what_a_product_takes(in_blocks: bool, scales: tuple[int, ...]) -> None:
    weight_scales = (2, 8) if in_blocks else (256,)
    packed = PackedFp8(
        torch.empty(256, 640, dtype=torch.uint8, device="meta"),
        torch.empty(weight_scales, device="meta"),
        in_blocks,
        None,
        float("inf"),
    )
    x = torch.empty(5, 640, dtype=torch.bfloat16, device="meta")
    assert fits_rms_norm_e4m3(x)
    assert not fits_rms_norm_e4m3(x[:, 1:])
    rows = rms_norm_e4m3(x, x[0], 1e-5, packed)
    assert (len(rows), rows.codes.shape, rows.scales.shape, rows.dtype) == (5, (5, 640), scales, x.dtype)
    product = fp8_linear(rows, packed)
    assert (product.shape, product.dtype) == ((5, 256), x.dtype)
    with pytest.raises(ValueError, match="weight"):
        rms_norm_e4m3(x, x[0, :-1], 1e-5, packed)
