"""How a step can fail so that it matters beyond its own requests. Plain Python: knows no device."""

from __future__ import annotations


class DeviceLost(Exception):
    """The device refuses all work from now on; only a new process can use it again."""


class OutOfDeviceMemory(Exception):
    """A step found too little memory and was not computed; the message says how much there was."""
