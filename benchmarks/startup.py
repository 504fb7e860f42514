"""From nothing to the first token: the server as a user starts it, Llama 3.1 8B's shape with dummy weights.

python -m benchmarks.startup
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.harness import Report, Roofs, main
from benchmarks.in_process import LLAMA_3_1_8B


def model_folder() -> Path:
    """config.json and a tokenizer of the right size: bytes, and made-up words nothing is merged into."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B), encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = int(str(LLAMA_3_1_8B["vocab_size"]))
    names = alphabet + [f"Ġword{i}" for i in range(size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return folder


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


def bench(report: Report, roofs: Roofs) -> None:
    del roofs
    folder = model_folder()
    begin = time.perf_counter()
    process, url = start_server(
        folder, "--load-format", "dummy", "--device", "cuda", "--max-total-tokens", "8192"
    )
    ready = time.perf_counter()
    body = json.dumps({"inputs": "Once upon a time", "parameters": {"max_new_tokens": 1}}).encode()
    request = urllib.request.Request(url + "/generate", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    first = time.perf_counter()
    process.terminate()
    process.wait()
    case = "llama-3.1-8b dummy weights"
    report.add("startup", case, ready - begin, metric="ready", unit="s")
    report.add(
        "startup", case, first - begin, metric="first_token", unit="s", baselines={"vllm 0.24 on H100": 81}
    )


if __name__ == "__main__":
    main(bench)
