"""What the plan says a quantised model's weights take, against what is then loaded; made-up weights of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.paged import Paged
from tests.quantization import test_bitsandbytes, test_exl2, test_gptq_kinds, writers
from tests.quantization.memory import loaded_bytes, planned_bytes, products_of
from tests.quantization.test_eight_bit import SERVED
from tests.quantization.test_int8_inputs import ROUNDED
from tests.quantization.test_served import CASES, TOKENS, Made, load, write_model
from tgi_server.checkpoint.dummy import DummyCheckpoint
from tgi_server.checkpoint.gguf_blocks import DECODERS
from tgi_server.checkpoint.headers import stored_tensors
from tgi_server.checkpoint.safetensors import Checkpoint
from tgi_server.config import ModelConfig
from tgi_server.models import load_model
from tgi_server.quantization import on_load
from tgi_server.quantization.contents import contents_of
from tgi_server.quantization.declared import DECLARED, GGUF, ON_LOAD
from tgi_server.quantization.detect import FORMATS
from tgi_server.weight_bytes import weights_bytes

WEIGHTS = {"num_bits": 6, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CT = {
    "quant_method": "compressed-tensors",
    "config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def compressed(_name: str, weight: Tensor) -> Made:
    matrix = writers.rounded(weight, 6, 32, sym=True)
    tensors = {"weight_packed": writers.bit_stream(matrix.codes, 6), "weight_scale": matrix.scales}
    return tensors, matrix.dense().float()


ALL = {
    **CASES,
    **SERVED,
    **ROUNDED,
    "compressed-tensors, 6 bits": (CT, compressed),
    "bitsandbytes nf4": (test_bitsandbytes.NF4, test_bitsandbytes.nf4),
    "bitsandbytes int8": (test_bitsandbytes.INT8, test_bitsandbytes.int8),
    "gptq by rules, beside a dense matrix": (test_gptq_kinds.RULES, test_gptq_kinds.by_rule),
    "exl2": (test_exl2.SECTION, test_exl2.make({"": [6, 4, 3]})),
    "exl2, each its own": (
        test_exl2.SECTION,
        test_exl2.make({"": [5, 4], "v_proj": [8, 4], "down_proj": [4]}),
    ),
}
# The config says all of every matrix of a block.
ALIKE = [case for case in ALL if "beside" not in case and "exl2" not in case]


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, case: str) -> Path:
    write_model(tmp_path)
    writers.quantise_folder(tmp_path, *ALL[case])
    return tmp_path


def test_a_quantised_model_takes_what_the_plan_says(folder: Path) -> None:
    assert planned_bytes(folder) == pytest.approx(loaded_bytes(load(folder).model), rel=0.03)


@pytest.mark.parametrize("case", ALIKE, indirect=True)
def test_the_config_alone_makes_the_plan_that_the_headers_make(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    for on_gpu in (False, True):
        headers, config = (
            planned_bytes(folder, on_gpu=on_gpu, with_headers=given) for given in (True, False)
        )
        assert headers == config


@pytest.mark.parametrize("case", ALIKE, indirect=True)
def test_made_up_weights_have_the_kind_that_the_config_says(folder: Path) -> None:
    config, device = ModelConfig.from_folder(folder), torch.device("cpu")
    served = load(folder).model
    made_up = load_model(DummyCheckpoint(folder, device, torch.float32), config, device, torch.float32)
    assert [type(product) for product in products_of(made_up)] == [type(one) for one in products_of(served)]
    assert loaded_bytes(made_up) == loaded_bytes(served)
    logits = Paged(made_up, config).step({"a": TOKENS})["a"]
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0


@pytest.mark.parametrize("name", on_load.ON_LOAD)
def test_a_model_that_is_quantised_while_it_loads_takes_what_the_plan_says(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    config, device = ModelConfig.from_folder(tmp_path), torch.device("cpu")
    contents = contents_of(config.raw, tmp_path, stored_tensors(tmp_path), name)
    model = load_model(Checkpoint(tmp_path), config, device, torch.float32, name)
    assert weights_bytes(config, contents, 1, on_gpu=False) == pytest.approx(loaded_bytes(model), rel=0.03)


def test_every_format_that_is_served_can_be_planned() -> None:
    assert set(FORMATS) == set(DECLARED)
    assert set(on_load.ON_LOAD) <= set(ON_LOAD)
    assert set(DECODERS) == set(GGUF)
