"""bitsandbytes' matrices are read to the bits that it reads, or refused; dense ones are rounded as it does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantization import writers
from tests.quantization.held import Held, read
from tests.quantization.make_bitsandbytes import CASES, FILE, digest, made
from tests.quantization.test_formats import weight_of
from tests.quantization.test_served import TOKENS, load, write_both, write_model
from tgi_kernels.quant_weight import dequantise, table
from tgi_server.errors import StartupError
from tgi_server.quantization.detect import scheme_of
from tgi_server.quantization.on_load import ON_LOAD, chosen_scheme
from tgi_server.quantization.rounding import round_rows

STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def stored(case: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in load_file(FILE).items()
        if name.startswith(f"{case}.")
    }


def section_of(case: str) -> dict[str, Any]:
    _, _, kind, _, double, storage = CASES[case]
    return NF4 | {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_quant_storage": storage,
    }


@pytest.mark.parametrize("case", CASES)
def test_four_bits_have_the_bits_that_bitsandbytes_reads(case: str) -> None:
    with safe_open(FILE, framework="pt") as file:
        expected = json.loads(file.metadata()["digests"])[case]
    weight = read(section_of(case), stored(case), *CASES[case][:2])
    assert digest(dequantise(weight, torch.float32)) == expected


def test_every_code_is_among_those_that_were_compared() -> None:
    for kind in ("nf4", "fp4"):
        codes = read(section_of(kind), stored(kind), *CASES[kind][:2]).codes
        assert len(codes.unique()) >= 15, "of fp4's two zeros bitsandbytes writes one"


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_what_bitsandbytes_makes(case: str) -> None:
    leaves, dense = made(pytest.importorskip("bitsandbytes"), case)
    for leaf, tensor in stored(case).items():
        assert torch.equal(leaves[leaf], tensor), leaf
    assert torch.equal(dequantise(read(section_of(case), leaves, *CASES[case][:2]), torch.float32), dense)


def test_eight_bits_are_within_a_unit_in_the_last_place_of_what_bitsandbytes_reads() -> None:
    leaves, dense = stored("int8"), load_file(FILE)["int8 dense"]
    assert len(leaves["weight"].unique()) == 255
    found = dequantise(read(INT8, leaves, *dense.shape), torch.float32)
    exact = leaves["weight"].double() * leaves["SCB"].double().unsqueeze(1) / 127
    assert bool(((found - exact).abs() <= exact.abs() * 2**-23).all())
    assert bool(((found - dense).abs() <= dense.abs() * 2**-22).all())
    assert torch.equal(found.bfloat16(), dense.bfloat16())


# ---- what is refused

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def says(**changes: object) -> Change:
    """Another content of the quant_state."""

    def change(_section: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


FOUR_BIT_FAULTS: dict[str, tuple[Change, str]] = {
    "neither width": (
        lambda s, _: s.update(load_in_4bit=False),
        "load_in_4bit is False and load_in_8bit is False",
    ),
    "both widths": (
        lambda s, _: s.update(load_in_8bit=True),
        "load_in_4bit is True and load_in_8bit is True",
    ),
    "width of a word": (lambda s, _: s.update(load_in_4bit="yes"), "load_in_4bit is 'yes'"),
    "another kind": (
        lambda s, _: s.update(bnb_4bit_quant_type="af4"),
        "bnb_4bit_quant_type is 'af4'; served are 'fp4', 'nf4'",
    ),
    "the other kind": (
        lambda s, _: s.update(bnb_4bit_quant_type="fp4"),
        f"bnb_4bit_quant_type is fp4, but there is m.{STATE}",
    ),
    "kind of the state": (says(quant_type="fp4"), f"m.{STATE}: quant_type is 'fp4'; served are 'nf4'"),
    "storage": (lambda s, _: s.update(bnb_4bit_quant_storage="int64"), "bnb_4bit_quant_storage is 'int64'"),
    "other storage": (
        lambda s, _: s.update(bnb_4bit_quant_storage="float16"),
        r"m.weight has shape \(1536, 1\)",
    ),
    "type of codes": (
        lambda s, _: s.update(bnb_4bit_quant_storage="int8"),
        "m.weight is stored as torch.uint8; its format asks for torch.int8",
    ),
    "double said, not there": (
        lambda s, _: s.update(bnb_4bit_use_double_quant=True),
        "use_double_quant is True, but m.weight.nested_absmax is missing",
    ),
    "double there, not said": (
        lambda _, t: t.update({"weight.nested_absmax": torch.ones(1)}),
        "use_double_quant is False, but m.weight.nested_absmax is there",
    ),
    "skipped": (
        lambda s, _: s.update(llm_int8_skip_modules=["lm_head", "m"]),
        "llm_int8_skip_modules has 'm', but there is m.weight.absmax",
    ),
    "skipped by a word": (lambda s, _: s.update(llm_int8_skip_modules="m"), "llm_int8_skip_modules is 'm'"),
    "block of 65": (says(blocksize=65), "blocksize is 65; served are 32, 64"),
    "no block": (says(blocksize=None), "blocksize is None"),
    "another shape": (says(shape=[192, 16]), r"shape is \[192, 16\]; config.json asks for \[16, 192\]"),
    "offset that is none": (says(nested_offset=math.nan), "nested_offset is nan"),
    "no state": (lambda _, t: t.pop(STATE), f"m.{STATE} is missing"),
    "state of noise": (lambda _, t: t[STATE].fill_(0xFF), f"m.{STATE} is not JSON"),
    "state of depth": (
        lambda _, t: t.update({STATE: torch.full((60_000,), ord("["), dtype=torch.uint8)}),
        "is not JSON",
    ),
    "state of a list": (
        lambda _, t: t.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}),
        "holds a list",
    ),
    "state without end": (
        lambda _, t: t.update({STATE: torch.zeros(1 << 20, dtype=torch.uint8)}),
        r"has shape \(1048576,\)",
    ),
    "another table": (
        lambda _, t: t["weight.quant_map"][3].fill_(-0.4),
        "quant_map is not that of nf4: code 3 stands for -0.4, not -0.394917",
    ),
    "table of NaN": (lambda _, t: t["weight.quant_map"].fill_(math.nan), "code 0 stands for nan"),
    "no table": (lambda _, t: t.pop("weight.quant_map"), "m.weight.quant_map has shape None"),
    "no scales": (lambda _, t: t.pop("weight.absmax"), "m.weight.absmax has shape None"),
    "scales of another block": (
        says(blocksize=128),
        r"m.weight.absmax has shape \(48,\); config.json asks for \(24,\)",
    ),
    "NaN scales": (
        lambda _, t: t["weight.absmax"][:5].fill_(math.nan),
        "5 of 48 scales in m.weight.absmax are NaN",
    ),
    "zero scales": (lambda _, t: t["weight.absmax"].zero_(), "all 48 scales in m.weight.absmax are zero"),
    "codes cut off": (lambda _, t: t.update(weight=t["weight"][:-1]), r"m.weight has shape \(1535, 1\)"),
}


@pytest.mark.parametrize("fault", FOUR_BIT_FAULTS)
def test_a_contradiction_in_four_bits_is_refused_with_name_and_numbers(fault: str) -> None:
    change, message = FOUR_BIT_FAULTS[fault]
    section, tensors = section_of("nf4"), stored("nf4")
    change(section, tensors)
    with pytest.raises(StartupError, match=message):
        read(section, tensors, *CASES["nf4"][:2])


EIGHT_BIT_FAULTS: dict[str, tuple[Change, str]] = {
    "16-bit weights": (
        lambda s, _: s.update(llm_int8_has_fp16_weight=True),
        "has_fp16_weight is True; served are False",
    ),
    "unsigned codes": (
        lambda _, t: t.update(weight=t["weight"].view(torch.uint8)),
        "m.weight is stored as torch.uint8",
    ),
    "no scales": (lambda _, t: t.pop("SCB"), "m.SCB has shape None"),
    "scales below zero": (lambda _, t: t["SCB"][3:5].neg_(), "2 of 12 numbers in m.SCB are below zero"),
    "infinite scales": (
        lambda _, t: t["SCB"][3].fill_(math.inf),
        "1 of 12 scales in m.SCB are NaN or infinite",
    ),
    "tiles": (lambda _, t: t["weight_format"].fill_(2), "m.weight_format is 2; 0 is served"),
}


@pytest.mark.parametrize("fault", EIGHT_BIT_FAULTS)
def test_a_contradiction_in_eight_bits_is_refused_with_name_and_numbers(fault: str) -> None:
    change, message = EIGHT_BIT_FAULTS[fault]
    section, tensors = dict(INT8), stored("int8")
    change(section, tensors)
    with pytest.raises(StartupError, match=message):
        read(section, tensors, 12, 40)


def test_rows_that_blocks_do_not_meet_at_a_multiple_of_8_are_refused() -> None:
    tensors = {
        STATE: torch.tensor(
            list(b'{"quant_type": "nf4", "blocksize": 64, "shape": [32, 100]}'), dtype=torch.uint8
        )
    }
    with pytest.raises(StartupError, match="m has 100 columns in blocks of 64 numbers"):
        read(NF4, tensors, 32, 100)


# ---- models


def nf4(_name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return writers.nf4(weight)


def int8(_name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return writers.int8(weight)


def only_mlp(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return nf4(name, weight) if "mlp" in name else ({"weight": weight}, weight)


@pytest.mark.parametrize(
    ("section", "make"),
    [(NF4, nf4), (INT8, int8), (NF4 | {"llm_int8_skip_modules": ["self_attn", "lm_head"]}, only_mlp)],
    ids=["nf4", "int8", "skipped modules"],
)
def test_logits_have_the_bits_of_the_dequantised_model(
    tmp_path: Path, section: dict[str, object], make: object
) -> None:
    quantised, dense = write_both(tmp_path, section, make)
    assert torch.equal(load(quantised).step({"a": TOKENS})["a"], load(dense).step({"a": TOKENS})["a"])


def test_a_config_that_says_so_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": NF4}))
    with pytest.raises(StartupError, match=r"says bitsandbytes nf4, but none of its \d+ tensors is a"):
        load(tmp_path)


# ---- while loading


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_made_while_loading_are_those_of_bitsandbytes(kind: str) -> None:
    weight = weight_of(24, 192)
    found = ON_LOAD[f"bitsandbytes-{kind}"].read(Held({"m.weight": weight}), "m", 24, 192)
    numbers = table(found.values)
    blocks = weight.unflatten(1, (3, 64))
    scales = blocks.abs().amax(2)
    near = (blocks / scales.unsqueeze(2)).unsqueeze(3).sub(numbers).abs().amin(3)
    assert torch.equal(found.scales, scales)
    far = (dequantise(found, torch.float32) - weight).abs().unflatten(1, (3, 64)) / scales.unsqueeze(2)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-6)
    package = pytest.importorskip("bitsandbytes")
    codes, state = package.functional.quantize_4bit(weight, quant_type=kind)
    assert torch.equal(dequantise(found, torch.float32), package.functional.dequantize_4bit(codes, state))


def test_rows_get_255_steps_and_a_scale_that_reaches_the_largest() -> None:
    weight = weight_of(64, 100) * torch.logspace(-7, 3, 64).unsqueeze(1)
    weight[5] = 0
    found = round_rows(weight)
    scales = found.scales.float()
    assert int(found.codes.min()) >= 1 and int(found.codes.max()) <= 255
    assert bool((scales * 127 >= weight.abs().amax(1, keepdim=True)).all())
    assert bool(((dequantise(found, torch.float32) - weight).abs() <= 0.5001 * scales).all())
    normal = weight.abs().amax(1) > 0.01
    assert bool((scales[normal, 0] * 126.8 <= weight[normal].abs().amax(1)).all()), (
        "nor is it larger than need be"
    )


def test_a_dense_model_is_quantised_while_it_loads_but_for_its_head(tmp_path: Path) -> None:
    quantised, dense = tmp_path / "quantised", tmp_path / "dense"
    for folder in (quantised, dense):
        write_model(folder)
    stood_for = writers.quantise_folder(quantised, NF4, nf4)
    save_file(stood_for, quantised / "model.safetensors")
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(config))
    asked = load(dense, "bitsandbytes-nf4").step({"a": TOKENS})["a"]
    assert torch.equal(asked, load(quantised).step({"a": TOKENS})["a"])
    plain, eight = (load(dense, quantize).step({"a": TOKENS})["a"] for quantize in ("", "eetq"))
    assert 0 < float((eight - plain).abs().max()) < 0.2 * float((asked - plain).abs().max())


def test_what_cannot_be_quantised_while_loading_is_refused() -> None:
    weight = weight_of(16, 100)
    with pytest.raises(StartupError, match="m: 100 columns are no multiple of 8; leave --quantize out"):
        ON_LOAD["bitsandbytes-nf4"].read(Held({"m.weight": weight}), "m", 16, 100)
    weight[3, 7] = math.nan
    with pytest.raises(StartupError, match=r"1 of 1600 numbers in m.weight are NaN"):
        ON_LOAD["eetq"].read(Held({"m.weight": weight}), "m", 16, 100)
    with pytest.raises(StartupError, match=r"m.weight is stored as torch.int8"):
        ON_LOAD["eetq"].read(Held({"m.weight": weight.to(torch.int8)}), "m", 16, 100)


@pytest.mark.parametrize(
    ("asked", "section", "message"),
    [
        ("bitsandbytes", NF4, None),
        ("bitsandbytes-nf4", NF4, None),
        ("bitsandbytes-fp4", NF4, "is quantised already, as bitsandbytes nf4"),
        ("bitsandbytes", INT8, None),
        ("bitsandbytes-nf4", INT8, "is quantised already, as bitsandbytes int8"),
        ("gptq", {"quant_method": "gptq"}, None),
        ("gptq_marlin", {"quant_method": "gptq"}, None),
        ("gptq", {"quant_method": "awq"}, "--quantize gptq: model is quantised already, as awq 4 bit"),
        ("eetq", {"quant_method": "gptq"}, "is quantised already, as gptq 4 bit"),
        ("awq", None, "--quantize awq: model is not quantised, and such codes are not made while loading"),
        ("eetq", None, None),
    ],
)
def test_a_format_that_is_asked_for_is_the_checkpoints_or_is_made(
    asked: str, section: dict[str, object] | None, message: str | None
) -> None:
    own = None if section is None else scheme_of({"quantization_config": section}, Path("model"))
    if message is None:
        assert chosen_scheme(asked, own, Path("model")) is (own or ON_LOAD[asked])
    else:
        with pytest.raises(StartupError, match=message):
            chosen_scheme(asked, own, Path("model"))
