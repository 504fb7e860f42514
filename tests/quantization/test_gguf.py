"""A GGUF file serves as it is what the dense model of its dequantised weights serves, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from tests.checkpoint.tiny_gguf import (
    GGUF_ROLES,
    TOKENS,
    gguf_name,
    pairs_adjacent,
    random_blocks,
    random_llama,
    weights_of,
    write_gguf,
    write_tensors,
)
from tests.models.paged import Paged
from tests.quantization.memory import loaded_bytes, planned_bytes
from tgi_kernels.quant_weight import dequantise
from tgi_server.checkpoint.gguf_blocks import DECODERS, weight_of_blocks
from tgi_server.checkpoint.gguf_file import KINDS, OTHER_KINDS
from tgi_server.checkpoint.gguf_model import DENSE
from tgi_server.checkpoint.hub import model_folder
from tgi_server.checkpoint.source import open_checkpoint
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.models import load_model

Q = GGMLQuantizationType
HEADS, KV_HEADS, HIDDEN = 4, 2, 256
SIZES = {
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": 512,
    "llama.block_count": 1,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
}
SHAPES = {
    "model.embed_tokens": (len(TOKENS), HIDDEN),
    "lm_head": (len(TOKENS), HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (512, HIDDEN),
    "mlp.up_proj": (512, HIDDEN),
    "mlp.down_proj": (HIDDEN, 512),
}
NORMS = ("model.norm", "input_layernorm", "post_attention_layernorm")
IDS = torch.randint(len(TOKENS), (24,), generator=torch.Generator().manual_seed(7)).tolist()
ALL_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = ALL_HALVES[np.isfinite(ALL_HALVES)]


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


def load(model: Path) -> Paged:
    folder = model_folder(str(model))
    config = ModelConfig.from_folder(folder)
    return Paged(load_model(open_checkpoint(folder), config, torch.device("cpu"), torch.float32), config)


def logits(model: Path) -> Tensor:
    return load(model).step({"a": IDS})["a"]


def halves_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of `pairs_adjacent`."""
    order = pairs_adjacent(np.arange(len(rows)), heads)
    back = np.empty_like(rows)
    back[order] = rows
    return back


def write_both(folder: Path, kind_of: Callable[[str], GGMLQuantizationType], *, tied: bool = False) -> Path:
    """A GGUF file of random blocks, and in `folder`/dense what the gguf package makes of them."""
    dice = np.random.default_rng(5)
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = {}
    dense: dict[str, Tensor] = {}
    for number, (role, (rows, columns)) in enumerate(SHAPES.items()):
        if tied and role == "lm_head":
            continue
        name = f"{role}.weight" if number < 2 else f"model.layers.0.{role}.weight"
        kind = kind_of(role)
        if kind.name in DENSE:
            weight = torch.from_numpy(dice.standard_normal((rows, columns), np.float32) * 0.05)
            stored = weight.to({Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32))
            data = stored.view(torch.uint8).numpy() if kind is Q.BF16 else stored.numpy()
            values = stored.float().numpy()
        else:
            data = random_blocks(rows, columns, kind, dice.uniform(-0.01, 0.01, 99), seed=number)
            values = dequantize(data, kind)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(role)
        tensors[gguf_name(name)] = (data, kind)
        dense[name] = torch.from_numpy(halves_together(values, heads) if heads else values.copy())
    for role in NORMS:
        name = f"{role}.weight" if role in SHAPES or "." in role else f"model.layers.0.{role}.weight"
        norm = dice.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        tensors[gguf_name(name)] = (norm, Q.F32)
        dense[name] = torch.from_numpy(norm)
    write_tensors(folder / "model.gguf", tensors, SIZES)
    write_dense(folder, dense, rounded=kind_of("model.embed_tokens").name not in DENSE)
    return folder / "model.gguf"


def write_dense(folder: Path, dense: dict[str, Tensor], *, rounded: bool) -> None:
    """`rounded`: the embedding is that of a quantised one, which is looked up in bfloat16."""
    described = model_folder(str(folder / "model.gguf"))
    config = json.loads((described / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    embedding = dense["model.embed_tokens.weight"]
    dense = {"lm_head.weight": embedding.clone(), **dense}
    if rounded:
        dense["model.embed_tokens.weight"] = embedding.bfloat16()
    save_file(dense, folder / "dense" / "model.safetensors")


@pytest.mark.parametrize("kind", DECODERS)
def test_every_weight_is_the_number_the_gguf_package_gives(kind: str) -> None:
    blocks = random_blocks(37, 1024, Q[kind], FINITE)
    weight = weight_of_blocks(
        kind, torch.from_numpy(blocks).view(37, -1, KINDS_BY_NAME[kind].size_bytes), "m"
    )
    found = dequantise(weight, torch.float32).numpy()
    assert np.array_equal(found.view(np.int32), dequantize(blocks, Q[kind]).view(np.int32))
    assert int(weight.codes.max()) == (1 << weight.bits) - 1


KINDS_BY_NAME = {kind.name: kind for kind in KINDS.values()}


@pytest.mark.parametrize("kind", KINDS_BY_NAME)
def test_logits_have_the_bits_of_the_dequantised_model(tmp_path: Path, kind: str) -> None:
    path = write_both(tmp_path, lambda _: Q[kind])
    found = load(path)
    want = logits(tmp_path / "dense")
    assert want.std() > 0.01
    assert torch.equal(found.step({"a": IDS})["a"], want)
    one_by_one = load(path)
    assert torch.equal(torch.cat([one_by_one.step({"a": [token]})["a"] for token in IDS]), want)


def test_types_may_differ_in_a_product_and_a_tied_head_is_the_embedding_once_more(tmp_path: Path) -> None:
    mixed = {
        "self_attn.v_proj": Q.Q6_K,
        "mlp.down_proj": Q.Q5_0,
        "mlp.up_proj": Q.F16,
        "model.embed_tokens": Q.Q8_0,
    }
    path = write_both(tmp_path, lambda role: mixed.get(role, Q.Q4_K), tied=True)
    assert torch.equal(logits(path), logits(tmp_path / "dense"))
    served = load(path).model
    assert served.embedding.table.dtype == torch.bfloat16
    assert planned_bytes(model_folder(str(path))) == pytest.approx(loaded_bytes(served), rel=0.03)


@pytest.mark.parametrize("kind", KINDS_BY_NAME)
def test_a_file_takes_the_memory_that_the_plan_says(tmp_path: Path, kind: str) -> None:
    path = write_both(tmp_path, lambda _: Q[kind])
    assert planned_bytes(model_folder(str(path))) == pytest.approx(loaded_bytes(load(path).model), rel=0.03)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_scale_that_is_no_number_is_refused(kind: str) -> None:
    bad = 0x7E00 if kind in ("Q4_0", "Q6_K") else 0xFC00
    halves = np.append(FINITE[:400], np.array([bad], np.uint16).view(np.float16))
    blocks = random_blocks(64, 2048, Q[kind], halves)
    with pytest.raises(StartupError, match=rf"^x: \d+ of \d+ (scales|offsets) of its {kind} blocks are NaN"):
        weight_of_blocks(kind, torch.from_numpy(blocks).view(64, -1, KINDS_BY_NAME[kind].size_bytes), "x")


def test_every_type_of_the_package_is_served_or_refused_by_its_name() -> None:
    known = {number: kind.name for number, kind in KINDS.items()} | OTHER_KINDS
    assert {kind.value: kind.name for kind in Q} == known


@pytest.mark.parametrize(("arch", "make"), [("qwen2", Qwen2Config), ("qwen3", Qwen3Config)])
def test_qwen_is_what_transformers_computes(
    tmp_path: Path, arch: str, make: Callable[..., Qwen2Config | Qwen3Config]
) -> None:
    torch.manual_seed(1)
    config = make(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    roles = {**GGUF_ROLES, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    tensors = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                tensor.copy_(torch.randn_like(tensor) * 0.1 + (tensor.ndim == 1))
            stem, leaf = name.rsplit(".", 1)
            role = stem.split(".", 3)[-1]
            theirs = f"blk.{stem.split('.')[2]}.{roles[role]}.{leaf}" if role in roles else gguf_name(name)
            tensors[theirs] = (tensor.numpy().copy(), Q.F32)
        write_tensors(tmp_path / "model.gguf", tensors, {}, arch)
        want = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), want, rtol=0, atol=2e-5)


LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_rotary_factors_are_llama_3s_scaling_worked_out(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = random_llama(tied=True)
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "rope_parameters": {"rope_theta": 10000.0, **LLAMA_31}})
    )
    turns = 10000.0 ** (-torch.arange(0, 16, 2) / 16) * 16 / (2 * torch.pi)
    blend = ((turns - 1) / 3).clamp(0, 1)
    factors = 1 / ((1 - blend) / 8 + blend)
    assert 1 < len(factors.unique()) < 8 and factors.max() == 8
    write_gguf(tmp_path / "model.gguf", weights_of(model), more={"rope_freqs.weight": factors.numpy()})
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(tmp_path / "dense"), rtol=0, atol=1e-6)
    write_gguf(tmp_path / "model.gguf", weights_of(model), more={"rope_freqs.weight": factors.numpy()[:-1]})
    with pytest.raises(StartupError, match=r"rope_freqs\.weight is F32 \(7,\) .* F32 \(8,\) without"):
        logits(tmp_path / "model.gguf")
    write_gguf(tmp_path / "model.gguf", weights_of(model), more={"rope_freqs.weight": -factors.numpy()})
    with pytest.raises(StartupError, match="8 positive numbers are needed"):
        logits(tmp_path / "model.gguf")
