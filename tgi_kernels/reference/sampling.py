"""Oracle of `tgi_kernels.sampling`."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [rows, vocab]. Returns ids [rows] int64 and logprobs [rows] float64."""
    wide = logits.double()
    choosable = wide.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    most = choosable.amax(-1, keepdim=True)
    ids = (choosable == most).int().argmax(-1)  # argmax gives the first of equal values
    logprobs = wide.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return ids, logprobs
