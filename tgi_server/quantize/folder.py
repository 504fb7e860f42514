"""The folder that `tgi-server quantize` writes, layer by layer, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors.torch import load_file, save_file
from torch import Tensor

from tgi_server.errors import StartupError

_WORK: Final = ".quantize"  # what is done so far; gone when all is
_SETTINGS: Final = "settings.json"
_WEIGHTS: Final = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


class Unfinished:
    """A folder in the making. Raises StartupError if `out` holds anything but an unfinished run of these settings."""

    def __init__(self, source: Path, out: Path, settings: Mapping[str, object]) -> None:
        self._source, self._out, self._work = source, out, out / _WORK
        path = self._work / _SETTINGS
        if out.exists() and not path.exists() and any(out.iterdir()):
            raise StartupError(
                f"{out} exists and is not empty; give a folder that is new, or one that was begun"
            )
        if path.exists():
            begun = json.loads(path.read_text(encoding="utf-8"))
            if begun != settings:
                differing = [key for key in settings if begun.get(key) != settings[key]]
                raise StartupError(
                    f"{out} was begun with other settings ({', '.join(differing)} differ); give the same, "
                    "or another folder"
                )
        self._work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")

    def has(self, part: str) -> bool:
        return self._path(part).exists()

    def load(self, part: str) -> dict[str, Tensor]:
        return load_file(self._path(part))

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Whole or not at all."""
        beside = self._work / "writing"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"format": "pt"})
        beside.chmod(0o644)  # safetensors lets nobody else read what it writes
        beside.rename(self._path(part))

    def finish(self, parts: list[str], section: Mapping[str, object]) -> None:
        """Name the shards as the Hub does, copy what is no weight, and write config.json last."""
        weight_map: dict[str, str] = {}
        total = 0
        for number, part in enumerate(parts, 1):
            name = f"model-{number:05}-of-{len(parts):05}.safetensors"
            tensors = self.load(part)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            self._path(part).rename(self._out / name)
        _write(
            self._out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
        for file in sorted(self._source.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, self._out / file.name)
        config = json.loads((self._source / "config.json").read_text(encoding="utf-8"))
        _write(self._out / "config.json", config | {"quantization_config": section})
        shutil.rmtree(self._work)

    def _path(self, part: str) -> Path:
        return self._work / f"{part}.safetensors"


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
