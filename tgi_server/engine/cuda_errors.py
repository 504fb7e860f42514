"""Telling apart what CUDA says: too little memory, a device that is lost, or one step that went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tgi_server.engine.failures import DeviceLost, OutOfDeviceMemory

_GIB = 1 << 30


@contextmanager
def named_errors(device: torch.device) -> Iterator[None]:
    """Raises OutOfDeviceMemory or DeviceLost for errors that mean that; lets others pass.

    An error that sticks (an illegal access, a failed assertion, a lost bus) comes back from every later call: it is
    known by asking once more, whatever it is called.
    """
    try:
        yield
    except RuntimeError as error:
        if _lost(device):
            raise DeviceLost(f"{torch.cuda.get_device_name(device)} is lost: {_first_line(error)}") from error
        if isinstance(error, torch.OutOfMemoryError) or "cudaErrorMemoryAllocation" in str(error):
            # The allocator's unused blocks are part of what is missing, but in pieces.
            torch.cuda.empty_cache()
            raise OutOfDeviceMemory(_memory(device)) from error
        raise


def _lost(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _memory(device: torch.device) -> str:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return (
        f"of {total_bytes / _GIB:.2f} GiB of GPU memory {free_bytes / _GIB:.2f} are free and "
        f"{torch.cuda.memory_reserved(device) / _GIB:.2f} this server's"
    )


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
