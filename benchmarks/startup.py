"""From nothing to the first token: the server as a user starts it, on a model of Llama 3.1 8B's shape.

    python -m benchmarks.startup [--folder DIR]    # DIR: where 16 GB of safetensors have room; default /tmp

Twice: with dummy weights, made on the device; and from safetensors that were just written, hence in the page cache.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from benchmarks.harness import ROOT, Report, csrc_sha256, device_name
from benchmarks.in_process import LLAMA_3_1_8B

LAYERS_PER_SHARD = 8  # 3.5 GB each, as on the Hub


def model_folder(parent: Path | None = None) -> Path:
    """config.json, a chat template, and a tokenizer of the right size: bytes, and words nothing is merged into."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    (folder / "config.json").write_text(
        json.dumps({**LLAMA_3_1_8B, "torch_dtype": "bfloat16"}), encoding="utf-8"
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = int(str(LLAMA_3_1_8B["vocab_size"]))
    names = alphabet + [f"Ġword{i}" for i in range(size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return folder


def write_weights(folder: Path) -> int:
    """Random safetensors shards with their index; the bytes of all."""
    hidden, inner, vocab = 4096, 14336, 128256
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shards: list[dict[str, Tensor]] = []
    for first in range(0, 32, LAYERS_PER_SHARD):
        layers = range(first, first + LAYERS_PER_SHARD)
        shard = {
            f"model.layers.{i}.{name}.weight": _random(*shape)
            for i in layers
            for name, shape in shapes.items()
        }
        for i in layers:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        shards.append(_save(folder, f"model-{len(shards)}.safetensors", shard))
    ends = {"model.embed_tokens.weight": _random(vocab, hidden), "lm_head.weight": _random(vocab, hidden)}
    ends["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    shards.append(_save(folder, f"model-{len(shards)}.safetensors", ends))
    index = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _random(*shape: int) -> Tensor:
    """Made on the GPU: the host would take minutes."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02).cpu()


def _save(folder: Path, name: str, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a shard; its names, with nothing that keeps its memory."""
    save_file(shard, folder / name)
    return dict.fromkeys(shard, torch.empty(0))


def start_server(folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server on a free port, and its address once it is ready."""
    command = [
        sys.executable,
        "-m",
        "tgi_server.cli",
        "serve",
        "--model-id",
        str(folder),
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if ready := re.search(rb"is ready on (http://\S+)", line):
            return process, ready.group(1).decode()
    raise SystemExit(f"the server ended with {process.wait()} before it was ready")


def first_token(folder: Path, *options: str) -> tuple[float, float]:
    """Seconds from the start of the process until it is ready, and until a client has a token."""
    begin = time.perf_counter()
    process, url = start_server(folder, "--device", "cuda", "--max-total-tokens", "8192", *options)
    ready = time.perf_counter()
    try:
        body = json.dumps({"inputs": "Once upon a time", "parameters": {"max_new_tokens": 1}}).encode()
        request = urllib.request.Request(url + "/generate", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()
        return ready - begin, time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait()


def measure(report: Report, case: str, folder: Path, *options: str) -> None:
    ready, first = first_token(folder, *options)
    report.add("startup", case, ready, metric="ready", unit="s")
    report.add("startup", case, first, metric="first token", unit="s", baselines={"vllm 0.24 on H100": 81})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the safetensors are written; 16 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    report = Report(device_name(), csrc_sha256())
    folder = model_folder(args.folder)
    try:
        measure(report, "llama-3.1-8b dummy weights", folder, "--load-format", "dummy")
        begin = time.perf_counter()
        size = write_weights(folder)
        torch.cuda.empty_cache()
        print(
            f"{size / 1e9:.1f} GB of safetensors written in {time.perf_counter() - begin:.1f} s", flush=True
        )
        measure(report, "llama-3.1-8b 16 GB of safetensors in the page cache", folder)
    finally:
        shutil.rmtree(folder)
        report.write(args.out / report.device / "startup.jsonl")
        print(report.table())


if __name__ == "__main__":
    main()
