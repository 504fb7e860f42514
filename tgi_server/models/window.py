"""Which layers see only the last tokens, as config.json says it."""

from __future__ import annotations

from tgi_server.config import ModelConfig
from tgi_server.errors import StartupError


def sliding_window(config: ModelConfig, default: int = 0) -> int:
    """How many tokens a token sees, itself included; 0 is all. `default` is for a config without the key."""
    window = config.raw.get("sliding_window", default) or 0
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise StartupError(f"config.json: sliding_window is {window!r}; a number of tokens or null is needed")
    return window


def qwen_windows(config: ModelConfig) -> list[int]:
    """The window of each layer. Qwen's key is on only with `use_sliding_window`, and for the later layers."""
    if config.raw.get("use_sliding_window") is not True:
        return [0] * config.num_layers
    first = config.raw.get("max_window_layers", config.num_layers)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise StartupError(f"config.json: max_window_layers is {first!r}; a number of layers is needed")
    window = sliding_window(config)
    return [window if layer >= first else 0 for layer in range(config.num_layers)]
