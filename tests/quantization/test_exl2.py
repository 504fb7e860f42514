"""EXL2: every mixture of bits, groups and orders is read as published, served, or refused with names and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantization.exl2_writer import Mix, random_matrix
from tests.quantization.test_formats import read
from tests.quantization.test_served import TOKENS, load, write_both, write_model
from tgi_kernels.quant_segments import Segments, dequantise_segments
from tgi_kernels.quant_weight import QuantWeight, dequantise
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import Dense, Quantised, SideBySide
from tgi_server.layers.segmented import Segmented

SECTION = {"quant_method": "exl2", "version": "0.1.8", "bits": 4.25, "head_bits": 6}
MIXES: dict[str, Mix] = {
    "all widths": [(8, 32), (6, 32), (5, 64), (4, 64), (4, 64), (3, 32), (2, 32)],
    "a last group that is smaller": [(5, 128), (4, 128), (4, 128), (4, 64)],
    "one width": [(3, 64), (3, 64)],
    "one width, other group sizes": [(4, 32), (4, 128)],
    "groups of 16": [(3, 32), (2, 16), (2, 16)],
}


def dense(found: QuantWeight | Segments, dtype: torch.dtype) -> Tensor:
    return (dequantise_segments if isinstance(found, Segments) else dequantise)(found, dtype)


@pytest.mark.parametrize("leaf", ["q_invperm", "q_perm"])
@pytest.mark.parametrize("out", [32, 40])
@pytest.mark.parametrize("mix", MIXES)
def test_every_code_scale_and_column_is_read_as_published(mix: str, out: int, leaf: str) -> None:
    matrix = random_matrix(MIXES[mix], out)
    found = read(SECTION, matrix.tensors(leaf=leaf), out, sum(size for _, size in MIXES[mix]))
    assert isinstance(found, Segments) == (mix != "one width")
    assert torch.equal(dense(found, torch.float32).double(), matrix.dense())
    rounded = matrix.dense().half()  # what the format's own kernels multiply with
    assert torch.equal(dense(found, torch.float16), rounded)


def test_scales_round_as_the_format_says() -> None:
    matrix = random_matrix([(4, 32), (3, 32)], 32)
    matrix.largest[:] = [0.0007, 60000]  # a 256th of the first is below float16's normal numbers
    found = read(SECTION, matrix.tensors(), 32, 64)
    assert torch.equal(dense(found, torch.float32).double(), matrix.dense())


def test_columns_in_their_own_order_need_no_gathering() -> None:
    found = read(SECTION, random_matrix([(5, 32), (4, 32)], 32, ordered=False).tensors(), 32, 64)
    assert found.order is None


def make(mixes: dict[str, list[int]]) -> Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]:
    """Matrices of the widths that the end of their name, or "", asks for, in groups of 32."""

    def one(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        bits = mixes.get(name.rsplit(".", 1)[1], mixes[""])
        blocks = weight.shape[1] // 32
        mix = [(bits[min(i, len(bits) - 1)], 32) for i in range(blocks)]
        # What has the same inputs has the same order.
        matrix = random_matrix(mix, len(weight), seed=blocks, size=0.3)
        return matrix.tensors(), matrix.dense().float()

    return one


@pytest.mark.parametrize(
    ("mixes", "kinds"),
    [
        ({"": [6, 4, 3]}, [Segmented] * 8),
        ({"": [4]}, [Quantised] * 8),
        ({"": [5, 4], "v_proj": [8, 4], "down_proj": [4]}, [SideBySide, Segmented, Segmented, Quantised] * 2),
    ],
    ids=["mixed", "even", "each its own"],
)
def test_a_model_answers_what_its_dense_copy_does_and_alike_for_any_number_of_tokens(
    tmp_path: Path, mixes: dict[str, list[int]], kinds: list[type]
) -> None:
    quantised, copy = write_both(tmp_path, SECTION, make(mixes))
    served = load(quantised)
    found = [type(layer.product) for layer in served.model.modules() if isinstance(layer, Linear)]
    assert found == [*kinds, Dense]
    logits = served.step({"a": TOKENS})["a"]
    torch.testing.assert_close(logits, load(copy).step({"a": TOKENS})["a"], rtol=0, atol=2e-4)
    one_by_one = load(quantised)
    assert torch.equal(torch.cat([one_by_one.step({"a": [token]})["a"] for token in TOKENS]), logits)


def test_a_head_that_was_tied_and_quantised_is_taken_from_its_codes(tmp_path: Path) -> None:
    quantised, copy = tmp_path / "quantised", tmp_path / "dense"
    for folder in (quantised, copy):
        write_model(folder)
    stored = load_file(quantised / "model.safetensors")
    head = random_matrix([(6, 32), (4, 64)], 101, size=0.3)
    del stored["lm_head.weight"]
    save_file(
        stored | {f"lm_head.{leaf}": part for leaf, part in head.tensors().items()},
        quantised / "model.safetensors",
    )
    save_file(stored | {"lm_head.weight": head.dense().float()}, copy / "model.safetensors")
    config = json.loads((quantised / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "quantization_config": SECTION}
    (quantised / "config.json").write_text(json.dumps(config))
    logits = load(quantised).step({"a": TOKENS})["a"]
    torch.testing.assert_close(logits, load(copy).step({"a": TOKENS})["a"], rtol=0, atol=2e-4)


Change = Callable[[dict[str, Tensor]], object]
FAULTS: dict[str, tuple[Change, str]] = {
    "bits": (
        lambda t: t["q_groups"][2].fill_(7),
        r"m.q_groups names codes of 7 bits; exl2 has 2, 3, 4, 5, 6, 8",
    ),
    "a first group that is not first": (
        lambda t: t["q_groups"][1].fill_(5),
        r"m.q_groups: group 0 begins at word 5; those before it end at 0",
    ),
    "a group of part of a word": (
        lambda t: t["q_groups"][3].fill_(9),
        r"group 0 of 5 bits has 9 words, 57 of 128 columns; groups are whole words",
    ),
    "more columns than there are": (
        lambda t: t["q_groups"][5].fill_(85),
        r"group 2 of 3 bits has what is left, -\d+ of 128 columns",
    ),
    "fewer words than groups": (
        lambda t: t.update(q_weight=t["q_weight"][1:]),
        r"m.q_weight has shape \(14, 64\); by m.q_groups and config.json it is \(15, 64\)",
    ),
    "rows of another model": (
        lambda t: t.update(q_weight=t["q_weight"][:, :32]),
        r"m.q_weight has shape \(15, 32\); by m.q_groups and config.json it is \(15, 64\)",
    ),
    "no groups": (
        lambda t: t.update(q_groups=t["q_groups"][:5]),
        r"m.q_groups has shape \(5,\); two numbers for each group",
    ),
    "scales of fewer groups": (lambda t: t.update(q_scale=t["q_scale"][:2]), r"m.q_scale has shape \(2, 8\)"),
    "scales that are no numbers": (
        lambda t: t["q_scale_max"][1].fill_(torch.inf),
        r"1 of 3 scales in m.q_scale_max are NaN or infinite",
    ),
    "a column that is there twice": (
        lambda t: t["q_invperm"][0].copy_(t["q_invperm"][1]),
        r"m.q_invperm is no order of 128 columns: 0 of its numbers lie outside, 1 are there more than once",
    ),
    "a column that is not there": (
        lambda t: t["q_invperm"][0].fill_(128),
        r"m.q_invperm is no order of 128 columns: 1 of its numbers lie outside, 0 are",
    ),
    "no order": (lambda t: t.pop("q_invperm"), r"there is neither m.q_invperm nor m.q_perm"),
    "two orders": (
        lambda t: t.update(q_perm=t["q_invperm"].flip(0)),
        r"m.q_perm and m.q_invperm contradict each other",
    ),
    "words of floats": (
        lambda t: t.update(q_weight=t["q_weight"].float()),
        r"m.q_weight is stored as torch.float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contradiction_is_refused_with_name_and_numbers(fault: str) -> None:
    change, message = FAULTS[fault]
    tensors = random_matrix([(5, 32), (4, 32), (3, 64)], 40).tensors()
    assert tensors["q_weight"].shape == (15, 64), "5 + 4 + 6 words"
    change(tensors)
    with pytest.raises(StartupError, match=message):
        read(SECTION, tensors, 40, 128)


def test_columns_that_fill_no_block_and_odd_averages_are_refused() -> None:
    with pytest.raises(StartupError, match=r"m has 72 columns; exl2 packs blocks of 32"):
        read(SECTION, random_matrix([(4, 64)], 32).tensors(), 32, 72)
    with pytest.raises(StartupError, match=r"bits is '4'; an average from 2 to 8"):
        read(SECTION | {"bits": "4"}, random_matrix([(4, 64)], 32).tensors(), 32, 64)
