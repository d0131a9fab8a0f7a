"""A warning for programs whose event loop is blocked while one of our calls waits."""

from __future__ import annotations

import os
import sys
import warnings

_HERE = os.path.dirname(__file__)


def warn() -> None:
    """Issue the warning for the line of the program that made the call."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and os.path.dirname(frame.f_code.co_filename) == _HERE:
        frame = frame.f_back
        level += 1
    warnings.warn(
        "this call waits, and blocks the asyncio event loop of its thread meanwhile: use nblock.AsyncLock and "
        "nblock.connect, or asyncio.to_thread",
        RuntimeWarning,
        stacklevel=level,
    )
