"""How a model's matrices are stored and multiplied, for people who ask a server."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from tgi_server.layers.linear import Linear

_NUMBER = re.compile(r"\.\d+\.")


def kinds(model: nn.Module) -> dict[str, str]:
    """Format and kernel by group of matrices, such as "model.layers.*.mlp.gate_proj, up_proj": "bfloat16 · dense".

    A group is what has the same place in each layer. Where layers differ each kind says how many have it.
    """
    found: dict[str, Counter[str]] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            found.setdefault(_group(module), Counter())[module.product.kind] += 1
    return {group: _counted(counts) for group, counts in found.items()}


def _group(linear: Linear) -> str:
    first, *others = linear.names
    return ", ".join([_NUMBER.sub(".*.", first), *(name.rpartition(".")[2] for name in others)])


def _counted(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{kind} ({count} of {counts.total()} layers)" for kind, count in counts.most_common())
