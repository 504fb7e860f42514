"""What a GGUF file says of its model, in Hugging Face's words: config, names of tensors, order of rows.

Knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from tgi_server.checkpoint.gguf_file import GgufFile, GgufTensor
from tgi_server.errors import StartupError

# `general.architecture` → `architectures` of config.json; the file's keys begin with the former.
ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DENSE: Final = ("F32", "F16", "BF16")
BLOCKS: Final = "blocks"  # the last part of a quantised matrix's name, see `stored_name`

# Hugging Face's name of a special token → llama.cpp's.
_SPECIAL_KEYS: Final = {
    "bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot", "eom": "eom"
}  # fmt: skip
_TOP_NAMES: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER: Final = re.compile("0|[1-9][0-9]{0,8}")
_ROPE_FACTORS: Final = "rope_freqs.weight"  # of each rotary frequency; Llama 3.1's scaling, worked out


def model_config(gguf: GgufFile) -> dict[str, Any]:
    """The content of `config.json`. Raises StartupError for a model that is not served, or described in part."""
    arch = gguf.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise StartupError(
            f"{gguf.path}: its architecture is {arch!r}; read are {', '.join(ARCHITECTURES)}, take the safetensors "
            "folder of another"
        )
    _refuse_parts(gguf, arch)
    heads = gguf.size(f"{arch}.attention.head_count")
    hidden = gguf.size(f"{arch}.embedding_length")
    head_dim = gguf.size(f"{arch}.attention.key_length", max(hidden // heads, 1))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "dtype": "bfloat16",
        "vocab_size": len(gguf.texts("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": gguf.size(f"{arch}.feed_forward_length"),
        "num_hidden_layers": gguf.size(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.size(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": gguf.size(f"{arch}.context_length"),
        "rms_norm_eps": gguf.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.number(f"{arch}.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    _check_tensors(gguf, config)
    return config | _rotary(gguf, arch, head_dim) | generation_config(gguf)


def is_quantised(gguf: GgufFile) -> bool:
    return any(tensor.kind.name not in DENSE for tensor in gguf.tensors.values())


def generation_config(gguf: GgufFile) -> dict[str, Any]:
    """The content of `generation_config.json`: the ids that begin, end and pad."""
    ids = special_ids(gguf)
    config: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    # End of text, of a turn, of a message: whichever comes, generation is over.
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def special_ids(gguf: GgufFile) -> dict[str, int]:
    """The ids of the special tokens the file names, under Hugging Face's names: bos, eos, pad …"""
    num_tokens = len(gguf.texts("tokenizer.ggml.tokens"))
    ids = {}
    for name, key in _SPECIAL_KEYS.items():
        if f"tokenizer.ggml.{key}_token_id" in gguf.metadata:
            ids[name] = gguf.integer(f"tokenizer.ggml.{key}_token_id")
            if not 0 <= ids[name] < num_tokens:
                raise StartupError(
                    f"{gguf.path}: {name} token {ids[name]} is outside the {num_tokens} tokens"
                )
    return ids


def weights(gguf: GgufFile) -> dict[str, GgufTensor]:
    """The tensors by Hugging Face's names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    return {_name(gguf, name): tensor for name, tensor in gguf.tensors.items() if name != _ROPE_FACTORS}


def stored_name(name: str, tensor: GgufTensor) -> str:
    """What the checkpoint calls the tensor that is `name` in Hugging Face's words: `….q4_k.blocks` if quantised."""
    if tensor.kind.name in DENSE:
        return name
    return f"{name.removesuffix('.weight')}.{tensor.kind.name.lower()}.{BLOCKS}"


def heads_of_pairs(gguf: GgufFile, tensor: GgufTensor) -> int | None:
    """How many heads the rows of `tensor` are, if the file has them in llama.cpp's order: the two rows that turn
    together side by side, not half a head apart. None for all other tensors.
    """
    role = tensor.name.split(".")[-2]
    if gguf.text("general.architecture") != "llama" or role not in ("attn_q", "attn_k"):
        return None
    heads = gguf.size("llama.attention.head_count")
    return heads if role == "attn_q" else gguf.size("llama.attention.head_count_kv", heads)


def _refuse_parts(gguf: GgufFile, arch: str) -> None:
    if gguf.integer("split.count", 1) > 1:
        raise StartupError(
            f"{gguf.path} is one of {gguf.integer('split.count')} parts; merge them with llama.cpp's gguf-split --merge"
        )
    if gguf.integer(f"{arch}.expert_count", 0):
        raise StartupError(f"{gguf.path}: {arch} with experts is not served; take a dense model")


def _rotary(gguf: GgufFile, arch: str, head_dim: int) -> dict[str, Any]:
    rotated = gguf.size(f"{arch}.rope.dimension_count", head_dim)
    scaling = gguf.text(f"{arch}.rope.scaling.type", "none")
    if rotated != head_dim or head_dim % 2 or scaling not in ("none", "linear"):
        raise StartupError(
            f"{gguf.path}: rotary embedding of {rotated} of {head_dim} dimensions, scaling {scaling!r}; "
            "only all of them, an even number, with scaling none or linear can be read"
        )
    found: dict[str, Any] = {}
    if scaling == "linear":
        found = {"rope_type": "linear", "factor": gguf.number(f"{arch}.rope.scaling.factor")}
    tensor = gguf.tensors.get(_ROPE_FACTORS)
    if tensor is not None:
        if found or tensor.kind.name != "F32" or tensor.shape != (head_dim // 2,):
            raise StartupError(
                f"{gguf.path}: {_ROPE_FACTORS} is {tensor.kind.name} {tensor.shape} beside scaling {scaling!r}; "
                f"F32 {(head_dim // 2,)} without another scaling is needed"
            )
        found = {"rope_type": "factors", "factors": gguf.floats(tensor)}
    return {"rope_scaling": found} if found else {}


def _check_tensors(gguf: GgufFile, config: Mapping[str, Any]) -> None:
    """Raise StartupError if a tensor is missing or has no place, or if its shape is not what `config` says."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    roles = {
        "attn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, q), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    if config["model_type"] == "qwen3":
        roles |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    expected = {"token_embd": (config["vocab_size"], hidden), "output_norm": (hidden,)}
    # A file cannot hold more layers than tensors: bounds what a lying layer count costs.
    for layer in range(min(config["num_hidden_layers"], len(gguf.tensors) + 1)):
        expected |= {f"blk.{layer}.{role}": shape for role, shape in roles.items()}
    for name, shape in expected.items():
        tensor = gguf.tensors.get(f"{name}.weight")
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"has shape {tensor.shape}"
            raise StartupError(f"{gguf.path}: tensor {name}.weight {found}; its metadata asks for {shape}")
    for name, tensor in weights(gguf).items():
        if len(tensor.shape) != 2 and tensor.kind.name not in DENSE:
            raise StartupError(
                f"{gguf.path}: {tensor.name} ({name}) of shape {tensor.shape} is {tensor.kind.name}; only matrices can "
                "be quantised"
            )


def _name(gguf: GgufFile, name: str) -> str:
    match name.split("."):
        case [top, "weight"] if top in _TOP_NAMES:
            return f"{_TOP_NAMES[top]}.weight"
        case ["blk", layer, role, ("weight" | "bias") as leaf] if role in _BLOCK_NAMES and _LAYER.fullmatch(
            layer
        ):
            return f"model.layers.{layer}.{_BLOCK_NAMES[role]}.{leaf}"
    raise StartupError(f"{gguf.path}: tensor {name[:100]!r} has no place in a model that is served")
