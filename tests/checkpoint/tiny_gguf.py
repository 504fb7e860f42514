"""A random two-layer llama as a GGUF file, as llama.cpp's converter would write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġt he", "1 2"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}
GGUF_ROLES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    )


def weights_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The model's tensors under transformers' names, a tied head left out."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


# Where the blocks of a type have numbers in float16.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(
    rows: int, columns: int, kind: GGMLQuantizationType, halves: np.ndarray, seed: int = 0
) -> np.ndarray:
    """[rows, bytes]: any codes, and scales drawn from `halves`; for types the package cannot quantise to, too."""
    dice = np.random.default_rng(seed)
    values, size = GGML_QUANT_SIZES[kind]
    blocks = dice.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in HALVES[kind.name]:
        drawn = dice.choice(halves.astype(np.float16), blocks.shape[:2])
        blocks[:, :, at : at + 2] = drawn[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, layer, role = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_ROLES[role]}.weight"


def pairs_adjacent(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp: rows i and i + half of a head, which turn together, side by side."""
    half = weight.shape[0] // heads // 2
    order = [
        head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)
    ]
    return weight[order]


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    changes: dict[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write `weights` (transformers' names and order), matrices quantised to `kind`; None drops a field.

    more: tensors under GGUF's names, in float32.
    """
    tensors = {name: (data, GGMLQuantizationType.F32) for name, data in (more or {}).items()}
    for name, weight in weights.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        rows = pairs_adjacent(weight, heads) if heads else weight
        kept = GGMLQuantizationType.F32 if rows.ndim == 1 else kind
        tensors[gguf_name(name)] = (rows if rows.ndim == 1 else quantize(rows, kind), kept)
    write_tensors(path, tensors, changes or {})


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]],
    changes: Mapping[str, Any],
    arch: str = "llama",
) -> None:
    """Write tensors under GGUF's names as their types store them, beside METADATA with changes."""
    writer = GGUFWriter(path, arch)
    for key, value in (METADATA | changes).items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key.replace("llama.", f"{arch}.", 1), value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
