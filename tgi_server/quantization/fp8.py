"""FP8 checkpoints, as DeepSeek, vLLM and AutoFP8 ("fp8"), fbgemm ("fbgemm_fp8") and ModelOpt ("modelopt") write them.

weight float8 (e4m3) [out, in]; weight_scale, or weight_scale_inv, which is multiplied with all the same: one number,
one a row, or one a block [⌈out / rows⌉, ⌈in / columns⌉]; input_scale where inputs are scaled by stored numbers.

The formats round inputs to e4m3 as well. They are left as they are, which is nearer to the model that was quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from tgi_kernels.quant_weight import QuantWeight
from tgi_server.errors import StartupError
from tgi_server.quantization.eight_bit import Tile, block_of, check_input_scale, read_e4m3
from tgi_server.quantization.scheme import Section, Tensors, choice


@dataclass(frozen=True)
class Fp8:
    """The settings of an FP8 checkpoint. Which matrices are quantised is what their scales say."""

    origin: str
    block: Tile | None  # None: a scale a matrix or a row, as its shape says
    is_static: bool  # inputs are scaled by stored numbers

    @classmethod
    def from_section(cls, section: Section, where: str) -> Fp8:
        """Of `quant_method` "fp8"."""
        choice(section, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3", where)
        scheme = choice(section, "activation_scheme", ("dynamic", "static"), "dynamic", where)
        _check_lists(section, where)
        return cls("fp8", block_of(section, "weight_block_size", where), scheme == "static")

    @classmethod
    def from_fbgemm(cls, section: Section, where: str) -> Fp8:
        _check_lists(section, where)
        bound = section.get("activation_scale_ub", 1200.0)
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
            raise StartupError(f"{where}: activation_scale_ub is {bound!r}; a positive number is needed")
        return cls("fbgemm_fp8", None, is_static=False)

    @classmethod
    def from_modelopt(cls, section: Section, where: str) -> Fp8:
        """Of `quantization_config`, or of hf_quant_config.json, which has the settings one level deeper."""
        inner = section.get("quantization", section)
        if not isinstance(inner, Mapping):
            raise StartupError(f"{where}: quantization is {inner!r}; an object is needed")
        algorithm = choice(inner, "quant_algo", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"), "", where)
        _check_lists(inner, where)
        return cls("modelopt", None, is_static=algorithm == "FP8")

    @property
    def title(self) -> str:
        block = f" in blocks of {self.block[0]}×{self.block[1]}" if self.block else ""
        return f"{self.origin} e4m3{block}, activations not rounded"

    @property
    def leaf(self) -> str:
        return "weight_scale"

    def covers(self, tensors: Tensors, name: str) -> bool:
        return self._scale(tensors, name) is not None

    def read(self, tensors: Tensors, name: str, out_features: int, in_features: int) -> QuantWeight:
        scale = self._scale(tensors, name)
        if scale is None:
            raise StartupError(f"{tensors.folder} has no {name}.weight_scale")
        check_input_scale(tensors, name, needed=self.is_static)
        is_one = prod(tensors.shape(scale)) == 1
        tile = self.block or ((out_features, in_features) if is_one else (1, in_features))
        return read_e4m3(tensors, name, tile, scale, out_features, in_features)

    def _scale(self, tensors: Tensors, name: str) -> str | None:
        names = tensors.names()
        found = [
            f"{name}.{leaf}" for leaf in ("weight_scale", "weight_scale_inv") if f"{name}.{leaf}" in names
        ]
        if len(found) > 1:
            raise StartupError(
                f"{tensors.folder} holds {' and '.join(found)}; a matrix has one of the two. "
                "Remove the one that does not belong"
            )
        return found[0] if found else None


def _check_lists(section: Section, where: str) -> None:
    """Names of what is not quantised; each tool matches them in its own way, so tensors decide."""
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        names = section.get(key)
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            raise StartupError(f"{where}: {key} is {names!r}; a list of names is needed")
