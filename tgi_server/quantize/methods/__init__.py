"""The ways to quantise, by the names that `tgi_server.quantize.arguments` gives them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Final

from tgi_server.quantize.methods.awq import AwqMethod
from tgi_server.quantize.methods.bitsandbytes import EightBitMethod, FourBitMethod
from tgi_server.quantize.methods.compressed_tensors import Fp8Method, W8A8Method, W8A16Method
from tgi_server.quantize.methods.exl2 import Exl2Method
from tgi_server.quantize.methods.gptq import GptqMethod
from tgi_server.quantize.methods.method import Method

MAKERS: Final[Mapping[str, Callable[[argparse.Namespace], Method]]] = {
    "gptq": GptqMethod.from_arguments,
    "awq": AwqMethod.from_arguments,
    "nearest": GptqMethod.from_arguments,
    "nf4": FourBitMethod.from_arguments,
    "int8": EightBitMethod.from_arguments,
    "fp8": Fp8Method.from_arguments,
    "w8a8": W8A8Method.from_arguments,
    "w8a16": W8A16Method.from_arguments,
    "exl2": Exl2Method.from_arguments,
}


def make_method(args: argparse.Namespace) -> Method:
    """The method that settled arguments ask for, whose model is a folder.

    Raises StartupError for values it does not have.
    """
    return MAKERS[args.method](args)
