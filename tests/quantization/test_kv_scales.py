"""Whoever asks for a KV cache of float8 is told what becomes of a checkpoint's scales for it."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.held import Held
from tgi_server.errors import StartupError
from tgi_server.quantization.kv_scales import kv_scale_warning


def test_a_float8_cache_without_scales_is_warned_of() -> None:
    assert "no scales for one" in kv_scale_warning(Held({"m.weight": torch.ones(1)}))


def test_calibrated_scales_are_said_not_to_be_applied() -> None:
    tensors = {"l.0.self_attn.k_scale": torch.tensor(0.05), "l.0.self_attn.v_scale": torch.tensor([0.5])}
    warning = kv_scale_warning(Held(tensors))
    assert "2 scales, from 0.05 to 0.5, are not applied" in warning


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (2.5, "k_scale is 2.5, so values reach 1120"),
        (0.0, "k_scale are no positive"),
        (torch.nan, "k_scale are no"),
    ],
)
def test_a_float8_cache_that_would_cut_values_off_is_refused(scale: float, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        kv_scale_warning(Held({"l.0.k_proj.k_scale": torch.tensor(scale)}))
