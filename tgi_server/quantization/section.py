"""Where a checkpoint's own folder says how it is quantised. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tgi_server.errors import StartupError

SECTIONS: Final = ("quantization_config", "compression_config")  # of config.json
# Files of older tools, and the format of each that does not name its own.
FILES: Final = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


@dataclass(frozen=True)
class Found:
    """The settings, the format they are of (None if nothing names one), and where they stand."""

    section: Mapping[str, object]
    method: str | None
    where: str


def find_section(config: Mapping[str, object], folder: Path) -> Found | None:
    """What the checkpoint whose config.json is `config` says; None if it is not quantised.

    Raises StartupError for what is no object.
    """
    for key in SECTIONS:
        section = config.get(key)
        if section is None:
            continue
        where = f"{folder / 'config.json'}: {key}"
        if not isinstance(section, Mapping):
            raise StartupError(f"{where} is {section!r}; an object is needed")
        return Found(section, _method(section, None), where)
    for name, method in FILES.items():
        path = folder / name
        if path.exists():
            try:
                section = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise StartupError(f"{path} is not JSON: {error}") from None
            if not isinstance(section, dict):
                raise StartupError(f"{path} holds a {type(section).__name__}, not a JSON object")
            return Found(section, _method(section, method), str(path))
    return None


def _method(section: Mapping[str, object], default: str | None) -> str | None:
    if section.get("version") in ("GEMM", "GEMV") and "quant_method" not in section:
        return "awq"  # AutoAWQ wrote quantize_config.json as well
    if "quant_algo" in section and "quant_method" not in section:
        return "modelopt"
    method = section.get("quant_method", default)
    return None if method is None else str(method)
