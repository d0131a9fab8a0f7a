"""The decorator ``synchronized``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ._asyncio import AsyncLock
from ._nblock import Client, Lock
from ._seconds import Seconds

_Function = TypeVar("_Function", bound=Callable[..., Any])


def synchronized(
    key: str,
    *,
    expire: Seconds | None = None,
    timeout: Seconds | None = None,
    auto_refresh: bool | None = None,
    client: Client | None = None,
) -> Callable[[_Function], _Function]:
    """Decorate a function so that it runs under the lock of a key, one call at a time.

    Each call makes a lock of its own, waits for it as ``with`` does, and raises LockUnavailable if it is not
    granted in time. For a coroutine function, an AsyncLock is used. The arguments are those of Lock. Wrong
    arguments raise TypeError or ValueError when the function is decorated.
    """
    # Reports wrong arguments where they are written, not at the first call.
    Lock(key, expire=expire, timeout=timeout, auto_refresh=auto_refresh, client=client)

    def decorate(function: _Function) -> _Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"synchronized cannot decorate the generator function {function.__qualname__}: the call only "
                "makes the generator, which runs later; use `with` inside it"
            )

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with Lock(key, expire=expire, timeout=timeout, auto_refresh=auto_refresh, client=client):
                return function(*args, **kwargs)

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            async with AsyncLock(key, expire=expire, timeout=timeout, auto_refresh=auto_refresh, client=client):
                return await function(*args, **kwargs)

        return cast(_Function, run_async if inspect.iscoroutinefunction(function) else run)

    return decorate


synchronized.__module__ = "nblock"
