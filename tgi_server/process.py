"""What the kernel knows of this process."""

from __future__ import annotations

import os
import time
from pathlib import Path


def age_s() -> float:
    """Seconds since this process was started; a change of the date does not change them."""
    # The name, in parentheses, may hold anything; what follows it are numbers, the 22nd field the start in ticks.
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    ticks = int(after_name.split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
