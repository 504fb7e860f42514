"""Which format a checkpoint is quantised in, by what lies in its own folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tgi_server.errors import StartupError
from tgi_server.quantization.awq import Awq
from tgi_server.quantization.bitsandbytes import bitsandbytes
from tgi_server.quantization.compressed_tensors import CompressedTensors
from tgi_server.quantization.exl2 import Exl2
from tgi_server.quantization.fp8 import Fp8
from tgi_server.quantization.gguf import Gguf
from tgi_server.quantization.gptq_rules import gptq_scheme
from tgi_server.quantization.marlin import Marlin
from tgi_server.quantization.scheme import Scheme, Section, Tensors

log = logging.getLogger(__name__)

# `quant_method` of a config → its format.
FORMATS: Final[dict[str, Callable[[Section, str], Scheme]]] = {
    "gptq": gptq_scheme,
    "awq": Awq.from_section,
    "compressed-tensors": CompressedTensors.from_section,
    "bitsandbytes": bitsandbytes,
    "fp8": Fp8.from_section,
    "fbgemm_fp8": Fp8.from_fbgemm,
    "modelopt": Fp8.from_modelopt,
    "exl2": Exl2.from_section,
    "marlin": Marlin.from_section,
    "gguf": Gguf.from_section,
}
SECTIONS: Final = ("quantization_config", "compression_config")  # of config.json
# Files of older tools, and the format of each that does not name its own.
FILES: Final = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


def find_scheme(config: Mapping[str, object], tensors: Tensors) -> Scheme | None:
    """What `scheme_of` finds, if the tensors of the checkpoint agree.

    Raises StartupError as well if none of them is quantised.
    """
    scheme, names = scheme_of(config, tensors.folder), tensors.names()
    if scheme is None or not names:
        return scheme
    if not any(f".{scheme.leaf}" in name for name in names):
        raise StartupError(
            f"{tensors.folder}: its config says {scheme.title}, but none of its {len(names)} tensors is a "
            f".{scheme.leaf}; the config or the weights belong to another model"
        )
    log.info("weights are quantised: %s", scheme.title)
    return scheme


def scheme_of(config: Mapping[str, object], folder: Path) -> Scheme | None:
    """The format of the checkpoint whose config.json is `config`; None if it is not quantised.

    Raises StartupError naming the format or setting that is not served.
    """
    found = _section(config, folder)
    if found is None:
        return None
    section, where, default = found
    method = section.get("quant_method", default)
    if section.get("version") in ("GEMM", "GEMV") and "quant_method" not in section:
        method = "awq"  # AutoAWQ wrote quantize_config.json as well
    if "quant_algo" in section and "quant_method" not in section:
        method = "modelopt"
    make = FORMATS.get(str(method))
    if make is None:
        raise StartupError(
            f"{where}: the checkpoint is quantised as {method!r}; served are {', '.join(FORMATS)}, and checkpoints "
            "that are not quantised"
        )
    return make(section, where)


def _section(config: Mapping[str, object], folder: Path) -> tuple[Section, str, str | None] | None:
    """The settings, where they stand, and the format they mean if they do not name one."""
    for key in SECTIONS:
        section = config.get(key)
        if section is None:
            continue
        where = f"{folder / 'config.json'}: {key}"
        if not isinstance(section, Mapping):
            raise StartupError(f"{where} is {section!r}; an object is needed")
        return section, where, None
    for name, method in FILES.items():
        path = folder / name
        if path.exists():
            try:
                section = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise StartupError(f"{path} is not JSON: {error}") from None
            if not isinstance(section, dict):
                raise StartupError(f"{path} holds a {type(section).__name__}, not a JSON object")
            return section, str(path), method
    return None
