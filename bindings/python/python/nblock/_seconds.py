"""How long something lasts."""

from __future__ import annotations

from datetime import timedelta
from typing import Union

#: A number of seconds, or a timedelta.
Seconds = Union[float, timedelta]  # noqa: UP007 - evaluated, and Python 3.10 is to understand it
