"""The ops on arrays of other libraries, CuPy and NumPy among them: shared through DLPack, never copied.

    rms_norm = on_arrays(norm.rms_norm)
    y = rms_norm(x, weight, 1e-5)          # CuPy arrays in, a CuPy array out

The functions of the other modules take torch's tensors alone, so that a decode step pays nothing for this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack


def on_arrays(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, for arrays of any library that speaks DLPack (it has `from_dlpack`), torch's tensors among them.

    What `op` writes (`out`, a cache) is written in the caller's arrays. What it returns comes as arrays of the
    library that the first foreign argument is of; with torch's tensors alone, as `op` itself returns it. Types
    that a library lacks, bfloat16 and float8 in CuPy, may be given as torch's tensors beside its arrays.
    On GPUs the op runs on torch's current stream, after what the caller's current stream holds; what that
    stream does next comes after the op. Raises BufferError or TypeError for arrays that cannot be shared (those
    of NumPy that are read-only), all else as `op`.
    """

    @wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        foreign: list[Any] = []
        result = op(
            *(_to_torch(value, foreign) for value in args),
            **{name: _to_torch(value, foreign) for name, value in kwargs.items()},
        )
        if not foreign:
            return result
        back = import_module(type(foreign[0]).__module__.partition(".")[0]).from_dlpack
        if result is None:
            # Sharing is what makes the caller's stream wait for torch's: without a result, share an argument.
            back(from_dlpack(foreign[0]))
            return None
        return _from_torch(result, back)

    return call


def _to_torch(value: Any, foreign: list[Any]) -> Any:
    """`value` with its arrays as tensors; those that were none are added to `foreign`."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__dlpack__"):
        foreign.append(value)
        return from_dlpack(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _each_field(value, lambda one: _to_torch(one, foreign))
    return value


def _from_torch(value: Any, back: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return back(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _each_field(value, lambda one: _from_torch(one, back))
    return tuple(_from_torch(one, back) for one in value) if isinstance(value, tuple) else value


def _each_field(value: Any, change: Callable[[Any], Any]) -> Any:
    return replace(value, **{one.name: change(getattr(value, one.name)) for one in fields(value)})
