"""Installs a wheel into fresh virtual environments of several Pythons and torches, and tries it in each.

    pip wheel . --no-deps --wheel-dir dist
    python tools/check_wheel.py dist/*.whl python3.10 python3.13 python3.11=torch==2.13.0

PYTHON alone: what does without torch is tried, `tgi-server plan` among it. PYTHON=REQUIREMENT: torch is installed as
asked and the op library computes beside it. Prints a Markdown row for each; the status is 1 if one failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}

# Runs in the environment: each family of ops against torch's own arithmetic.
_OPS = """
import torch
from tgi_kernels import activation, attention, matmul, norm, sampling
torch.manual_seed(0)
x, weight = torch.randn(5, 64), torch.randn(96, 64)
close = lambda got, expected: torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
close(norm.rms_norm(x, weight[0], 1e-5), torch.nn.functional.rms_norm(x, (64,), weight[0], 1e-5))
close(matmul.linear(x, matmul.pack_linear(weight)), x @ weight.T)
close(activation.silu_and_mul(x), torch.nn.functional.silu(x[:, :32]) * x[:, 32:])
assert torch.equal(sampling.greedy(x)[0], x.argmax(-1))
q, pages = torch.randn(5, 4, 16), torch.randn(1, 2, 2, 16, 16)
number = lambda *values: torch.tensor(values, dtype=torch.int32)
got = attention.attention(q, pages, number(0)[None], number(0, 5), number(5), 0.25)
k, v = (pages[0, i].repeat_interleave(2, 0)[:, :5] for i in range(2))
attend = torch.nn.functional.scaled_dot_product_attention
close(got, attend(q.movedim(1, 0), k, v, is_causal=True, scale=0.25).movedim(0, 1))
print(torch.__version__)
"""


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs beside torch, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [need for need in needs if "extra ==" not in need and not need.startswith("torch")]


def run(*command: str | Path) -> str:
    """What the command prints; raises CalledProcessError with what it had to say."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip()


def check(wheel: Path, python: str, torch: str) -> list[str]:
    """Install and try; the cells of a row."""
    with TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        own = Path(folder) / "bin" / "python"
        pip = (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, *requirements(wheel))
        run(*pip, "--no-deps", wheel)
        version = run(own, "-c", "import platform; print(platform.python_version())")
        packages = run(own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        run(own, "-m", "compileall", "-q", *(Path(packages) / name for name in ("tgi_server", "tgi_kernels")))
        (Path(folder) / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        plan = run(Path(folder) / "bin" / "tgi-server", "plan", folder, "--device-memory", "80GiB")
        if "12.55 GiB" not in plan:  # 6 738 415 616 parameters in 16 bits
            raise SystemExit(f"tgi-server plan says, under Python {version}:\n{plan}")
        if not torch:
            return [version, "", "installs, byte-compiles, `tgi-server plan`"]
        run(*pip, torch)
        return [version, run(own, "-c", _OPS), "the same, and the CPU ops compute"]


def main() -> int:
    wheel, *wanted = sys.argv[1:]
    failed = 0
    print("| Python | torch | |\n|---|---|---|", flush=True)
    for one in wanted:
        python, _, torch = one.partition("=")
        try:
            cells = check(Path(wheel).resolve(), python, torch)
        except subprocess.CalledProcessError as error:
            failed += 1
            cells = [
                python,
                torch,
                f"FAILED: {error.stderr.strip().splitlines()[-1] if error.stderr else error}",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
