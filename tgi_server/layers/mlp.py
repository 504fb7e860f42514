"""The feed-forward half of a block: down(activation(gate(x)) · up(x)). Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

from torch import Tensor, nn

from tgi_kernels.activation import Gate
from tgi_kernels.fp8 import Fp8Rows
from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError
from tgi_server.layers.linear import Linear
from tgi_server.layers.product import take_order
from tgi_server.layers.weights import Weights

# config.json's `hidden_act` → the activation of the gate.
GATES: dict[str, Gate] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class GatedMLP(nn.Module):
    """A gated feed-forward layer; gate and up are one product.

    Where down has its columns in another order (GPTQ's desc_act, EXL2) the rows of gate and up are put in it at load,
    so that nothing is gathered between them. The bits are those of gathering.
    """

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        down = Linear(weights, ["down_proj"], inner, [hidden])
        rows = take_order(down.product)
        self.gate_up = Linear(weights, ["gate_proj", "up_proj"], hidden, [inner, inner], rows)
        self.down = down
        self.gate = _gate(config)

    def forward(self, x: Tensor | Fp8Rows, residual: Tensor) -> None:
        """x: [tokens, hidden]; the result is added to `residual`, of the same shape, in place."""
        self.down.add_to(residual, self.gate_up(x, gate=self.gate))


def _gate(config: ModelConfig) -> Gate:
    name = config.raw.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in GATES:
        raise StartupError(f"config.json: hidden_act is {name!r}; supported are {', '.join(GATES)}")
    return GATES[name]
