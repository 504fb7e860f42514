"""Writes bitsandbytes.safetensors: matrices quantised by bitsandbytes itself, and what it makes of them again.

    python -m tests.quantization.make_bitsandbytes  # made with bitsandbytes 0.50.2

For each case its stored tensors below its name; in the metadata its settings and the SHA-256 of the float32 bytes of
the dense matrix (plus 0.0, so that no zero has a sign). Of int8, whose scale is rounded in another order, the matrix.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_name("bitsandbytes.safetensors")
# rows, columns, kind, block, double quantisation, storage
CASES: dict[str, tuple[int, int, str, int, bool, str]] = {
    "nf4": (16, 192, "nf4", 64, False, "uint8"),
    "fp4": (16, 192, "fp4", 64, False, "uint8"),
    "nf4 double": (264, 64, "nf4", 64, True, "uint8"),  # its scales need two nested blocks
    "fp4 double": (20, 128, "fp4", 128, True, "uint8"),
    "nf4 in bfloat16": (8, 128, "nf4", 64, False, "bfloat16"),
    "nf4 over rows": (
        5,
        96,
        "nf4",
        64,
        True,
        "uint8",
    ),  # blocks begin in the middle of a row, the last is short
    "nf4 of many rows": (6, 48, "nf4", 256, False, "uint8"),
    "fp4 in eights": (7, 40, "fp4", 64, False, "uint8"),
}


def digest(dense: Tensor) -> str:
    return hashlib.sha256((dense.float() + 0.0).contiguous().numpy().tobytes()).hexdigest()


def matrix(case: str) -> Tensor:
    """What is quantised."""
    rows, columns = CASES[case][:2]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * 0.05
    weight[0] = 0
    weight[1] *= torch.logspace(-9, 4, columns)
    return weight


def made(bitsandbytes: Any, case: str) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of a case by leaf, and the dense matrix that bitsandbytes reads from them."""
    rows, columns, kind, block, double, storage = CASES[case]
    weight = matrix(case)
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight,
        blocksize=block,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=getattr(torch, storage),
    )
    # As one row: the CPU kernel of version 0.50.2 takes wrong scales where blocks go over rows' ends.
    state.shape = torch.Size([1, rows * columns])
    dense = bitsandbytes.functional.dequantize_4bit(codes, state).view(rows, columns)
    state.shape = torch.Size([rows, columns])
    leaves = {f"weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **leaves}, dense


def main() -> None:
    import bitsandbytes

    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for case in CASES:
        leaves, dense = made(bitsandbytes, case)
        tensors |= {f"{case}.{leaf}": tensor.clone() for leaf, tensor in leaves.items()}
        notes[case] = digest(dense)
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(5)).half()
    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    codes.flatten()[:255] = torch.arange(-127, 128)
    tensors |= {
        "int8.weight": codes,
        "int8.SCB": largest,
        "int8.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    tensors["int8 dense"] = bitsandbytes.functional.int8_vectorwise_dequant(codes, largest)
    save_file(tensors, FILE, {"digests": json.dumps(notes)})
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
