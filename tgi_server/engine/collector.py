"""Python's garbage collector, as a loop that makes thousands of short-lived objects a second can bear it."""

from __future__ import annotations

import gc

# Objects made and not freed between two looks at the young ones, and looks between those at the older ones. A step of
# 256 sequences makes some 1500, which their counts free at once; Python's 700 meant three looks a step.
_THRESHOLDS = 50_000, 20, 100


def settle() -> None:
    """Set aside what loading made, for good, and look for garbage seldom.

    At 256 sequences half of a step's host time was walking what loading made.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
