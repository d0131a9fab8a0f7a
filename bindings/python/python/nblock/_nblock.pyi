from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, final, type_check_only

from typing_extensions import Self

__version__: str
