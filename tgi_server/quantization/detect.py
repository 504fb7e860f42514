"""Which format a checkpoint is quantised in, by what lies in its own folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tgi_server.errors import StartupError
from tgi_server.quantization.awq import Awq
from tgi_server.quantization.bitsandbytes import bitsandbytes
from tgi_server.quantization.compressed_tensors import CompressedTensors
from tgi_server.quantization.contents import contents_of
from tgi_server.quantization.dummy import DummyScheme
from tgi_server.quantization.exl2 import Exl2
from tgi_server.quantization.fp8 import Fp8
from tgi_server.quantization.gguf import Gguf
from tgi_server.quantization.gptq_rules import gptq_scheme
from tgi_server.quantization.marlin import Marlin
from tgi_server.quantization.scheme import Scheme, Section, Tensors
from tgi_server.quantization.section import find_section

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


def find_scheme(config: Mapping[str, object], tensors: Tensors) -> Scheme | None:
    """What `scheme_of` finds, if the tensors of the checkpoint agree; for made-up tensors, made-up codes.

    Raises StartupError as well if none of them is quantised.
    """
    scheme, names = scheme_of(config, tensors.folder), tensors.names()
    if scheme is None:
        return None
    if not names:
        return _made_up(config, tensors, scheme.title)
    if not any(f".{scheme.leaf}" in name for name in names):
        raise StartupError(
            f"{tensors.folder}: its config says {scheme.title}, but none of its {len(names)} tensors is a "
            f".{scheme.leaf}; the config or the weights belong to another model"
        )
    log.info("weights are quantised: %s", scheme.title)
    return scheme


def _made_up(config: Mapping[str, object], tensors: Tensors, title: str) -> Scheme:
    kind = contents_of(config, tensors.folder, {}).declared
    if kind is None or kind.is_mixed:
        raise StartupError(
            f"{tensors.folder}: --load-format dummy makes up no weights of {title}, whose config says too little of "
            "them; take a dense checkpoint's config, or one of GPTQ's"
        )
    return DummyScheme(kind, title)


def scheme_of(config: Mapping[str, object], folder: Path) -> Scheme | None:
    """The format of the checkpoint whose config.json is `config`; None if it is not quantised.

    Raises StartupError naming the format or setting that is not served.
    """
    found = find_section(config, folder)
    if found is None:
        return None
    make = FORMATS.get(str(found.method))
    if make is None:
        raise StartupError(
            f"{found.where}: the checkpoint is quantised as {found.method!r}; served are {', '.join(FORMATS)}, and "
            "checkpoints that are not quantised"
        )
    return make(found.section, found.where)
