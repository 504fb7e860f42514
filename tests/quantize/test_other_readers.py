"""What `tgi-server quantize` writes means to others what it means here.

Codes are taken from words bit by bit, as the formats are published, and transformers computes with the dense model.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.quantization.test_served import load, write_model
from tests.quantization.writers import AWQ_OUTPUTS
from tests.quantize.test_command import quantize, write_text

TOKENS = [i * i % 97 for i in range(60)]


def bits_of(words: Tensor) -> np.ndarray:
    """[rows, words] int32 to [rows, 32 · words], lowest bits first."""
    return np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")


def numbers(words: Tensor, bits: int) -> Tensor:
    """[rows, words] to the numbers of `bits` bits one after another, [rows, 32 · words / bits]."""
    each = bits_of(words).reshape(len(words), -1, bits).astype(np.int64)
    return torch.from_numpy((each << np.arange(bits)).sum(2))


def dense_of_gptq(part: dict[str, Tensor], bits: int, zero_shift: int = 1) -> Tensor:
    codes = numbers(part["qweight"].T, bits)
    zeros = numbers(part["qzeros"], bits).T + zero_shift
    group = part["g_idx"].long()
    return (codes - zeros[:, group]).double() * part["scales"].T[:, group].double()


def dense_of_gptq_v2(part: dict[str, Tensor], bits: int) -> Tensor:
    return dense_of_gptq(part, bits, zero_shift=0)


def dense_of_awq(part: dict[str, Tensor], _bits: int) -> Tensor:
    def outputs(words: Tensor) -> Tensor:
        mixed = numbers(words, 4).unflatten(1, (-1, 8))
        plain = torch.empty_like(mixed)
        plain[:, :, list(AWQ_OUTPUTS)] = mixed
        return plain.flatten(1).T

    codes, zeros = outputs(part["qweight"]), outputs(part["qzeros"])
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])
    return (codes - zeros[:, group]).double() * part["scales"].T[:, group].double()


@pytest.mark.parametrize(
    ("more", "bits", "dense_of"),
    [
        ([], 4, dense_of_gptq),
        (["--asymmetric"], 4, dense_of_gptq_v2),
        (["--desc-act", "--bits", "3"], 3, dense_of_gptq),
        (["--bits", "8"], 8, dense_of_gptq),
        (["--method", "awq", "--group-size", "32", "--samples", "4"], 4, dense_of_awq),
    ],
    ids=["gptq", "gptq, zero points", "gptq, 3 bits, desc_act", "gptq, 8 bits", "awq"],
)
def test_another_reader_gets_the_same_logits(
    tmp_path: Path, more: list[str], bits: int, dense_of: object
) -> None:
    assert callable(dense_of)
    model, out = tmp_path / "model", tmp_path / "out"
    write_model(model)
    write_text(model)
    assert quantize(model, out, *more) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored: dict[str, Tensor] = {}
    for shard in set(index["weight_map"].values()):
        stored |= load_file(out / shard)
    assert stored.keys() == index["weight_map"].keys()
    weights = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = {
            key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")
        }
        weights[f"{name}.weight"] = dense_of(parts, bits).float()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dense.load_state_dict(weights, strict=True)
    with torch.no_grad():
        want = dense(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(load(out).step({"a": TOKENS})["a"], want, rtol=0, atol=2e-4)
