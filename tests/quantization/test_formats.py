"""Every format's tensors become the codes, zero points and scales that their publishers mean, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.quantization import writers
from tests.quantization.held import Held, read
from tgi_kernels.quant_weight import dequantise
from tgi_server.errors import StartupError
from tgi_server.quantization.detect import FORMATS, scheme_of

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def weight_of(out: int, columns: int) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(5)) * 0.1


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_read_as_published(bits: int, group_size: int, sym: bool, version: int) -> None:
    for shuffled in (False, True):
        matrix = writers.rounded(weight_of(32, 192), bits, group_size, sym=sym, shuffled=shuffled)
        section = GPTQ | {
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "desc_act": shuffled,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        }
        found = read(section, writers.gptq(matrix, bits, version=version), 32, 192)
        assert torch.equal(dequantise(found, torch.float32).double(), matrix.dense())


def test_every_code_of_awq_is_read_as_published() -> None:
    matrix = writers.rounded(weight_of(40, 96), 4, 32, sym=False)
    matrix.codes[:, :32] = (torch.arange(40)[:, None] + torch.arange(32)) % 16
    matrix.zeros[:16, 1] = torch.arange(16)
    found = read(AWQ, writers.awq(matrix), 40, 96)
    assert torch.equal(dequantise(found, torch.float32).double(), matrix.dense())


def test_compressed_tensors_choose_settings_by_target() -> None:
    groups = {
        "a": {"targets": ["re:.*down_proj"], "weights": WEIGHTS | {"num_bits": 8}},
        "b": {"targets": ["Linear"], "weights": WEIGHTS},
    }
    scheme = scheme_of(
        {"compression_config": {"quant_method": "compressed-tensors", "config_groups": groups}}, Path("m")
    )
    assert scheme is not None and scheme.title == "compressed-tensors 4, 8 bit"
    for name, bits in (("x.down_proj", 8), ("x.up_proj", 4)):
        words = torch.zeros(8, 32 * bits // 32, dtype=torch.int32)
        held = Held({f"{name}.weight_packed": words, f"{name}.weight_scale": torch.ones(8, 1).half()})
        assert scheme.read(held, name, 8, 32).bits == bits


# ---- what is refused


@pytest.mark.parametrize("method", ["hqq", "aqlm", "nvfp4", "quip", "eetq", "exl3", "mxfp4", None])
def test_a_format_that_is_not_served_is_refused_by_name(method: str | None) -> None:
    with pytest.raises(StartupError, match=f"quantised as {method!r}; served are {', '.join(FORMATS)}"):
        scheme_of({"quantization_config": {"quant_method": method}}, Path("model"))


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
GPTQ_FAULTS: dict[str, tuple[Change, str]] = {
    "bits": (lambda s, _: s.update(bits=5), r"bits is 5; served are 2, 3, 4, 8"),
    "bits of a truth": (lambda s, _: s.update(bits=True), r"bits is True"),
    "group size": (
        lambda s, _: s.update(group_size=40),
        r"m: group_size 40 does not divide the matrix's 96 columns",
    ),
    "group size 0": (lambda s, _: s.update(group_size=0), r"group_size is 0"),
    "small group": (lambda s, _: s.update(group_size=4), r"group_size is 4; multiples of 8"),
    "packing": (lambda s, _: s.update(checkpoint_format="marlin_24"), r"checkpoint_format is 'marlin_24'"),
    "sym": (lambda s, _: s.update(sym="yes"), r"sym is 'yes'"),
    "zeros off by one": (
        lambda s, _: s.update(sym=True, checkpoint_format="gptq_v2"),
        r"zero points are 8, but 96 of 96 in m.qzeros are not \(found \[7\]\)",
    ),
    "no scales": (lambda _, t: t.pop("scales"), r"m.scales has shape None"),
    "zero scales": (lambda _, t: t["scales"].zero_(), r"all 96 scales in m.scales are zero"),
    "NaN scales": (lambda _, t: t["scales"][0].fill_(torch.nan), r"32 of 96 scales in m.scales are NaN"),
    "float32 scales": (
        lambda _, t: t.update(scales=torch.full((3, 32), 1 / 3)),
        r"m.scales holds float32 scales that neither",
    ),
    "scales of ints": (lambda _, t: t.update(scales=t["scales"].int()), r"m.scales is stored as torch.int32"),
    "codes of another size": (
        lambda _, t: t.update(qweight=t["qweight"][1:]),
        r"m.qweight has shape \(11, 32\)",
    ),
    "order without desc_act": (
        lambda _, t: t["g_idx"].copy_(t["g_idx"].flip(0)),
        r"m.g_idx puts columns in another order, but config says desc_act is false",
    ),
    "no order": (
        lambda s, t: (s.update(desc_act=True), t.pop("g_idx")),
        r"desc_act, but there is no m.g_idx",
    ),
    "groups that are not there": (
        lambda _, t: t["g_idx"].add_(1),
        r"m.g_idx names groups 1 to 3; there are 3",
    ),
    "uneven groups": (lambda _, t: t["g_idx"][:5].fill_(1), r"m.g_idx puts 27 columns into group 0"),
}


@pytest.mark.parametrize("fault", GPTQ_FAULTS)
def test_a_contradiction_in_gptq_is_refused_with_name_and_numbers(fault: str) -> None:
    change, message = GPTQ_FAULTS[fault]
    section = dict(GPTQ)
    tensors = writers.gptq(writers.rounded(weight_of(32, 96), 4, 32, sym=True), 4)
    change(section, tensors)
    with pytest.raises(StartupError, match=message):
        read(section, tensors, 32, 96)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (AWQ | {"version": "gemv"}, "version is 'gemv'; served are 'gemm'"),
        (AWQ | {"bits": 3}, "bits is 3; served are 4"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format is 'marlin-24'"),
        ({"quant_method": "compressed-tensors"}, "config_groups is None"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}}, "config_groups|lacks weights"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": {"x": 1}}
                },
            },
            "weights of 4 bits beside input_activations of 8 .W4A8. are not served",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS | {"type": "float"}}},
            },
            "type is 'float'",
        ),
    ],
)
def test_a_setting_that_is_not_served_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        scheme_of({"quantization_config": section}, Path("model"))


def test_a_matrix_that_is_both_dense_and_quantised_is_refused() -> None:
    tensors = writers.gptq(writers.rounded(weight_of(32, 96), 4, 32, sym=False), 4)
    with pytest.raises(StartupError, match=r"holds m.qweight and m.weight"):
        read(GPTQ, tensors | {"weight": weight_of(32, 96)}, 32, 96)
