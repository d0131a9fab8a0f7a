"""The type of durations."""

from __future__ import annotations

from datetime import timedelta
from typing import Union

#: A number of seconds, or a timedelta.
Seconds = Union[float, timedelta]  # noqa: UP007 - evaluated at run time, also by Python 3.10
