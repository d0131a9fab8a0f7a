"""Waiting that lets gevent's other greenlets run. Imported only in programs that have imported gevent."""

from __future__ import annotations

import importlib
import select
from typing import Any

# Type checkers work without these packages.
gevent: Any = importlib.import_module("gevent")
greenlet: Any = importlib.import_module("greenlet")
for _name in ("gevent.hub", "gevent.monkey"):
    importlib.import_module(_name)


def wanted() -> bool:
    """Whether waits in this thread must let other greenlets run: gevent is patched in, and this is not its hub."""
    if not gevent.monkey.is_module_patched("threading"):
        return False
    # A callback of the hub itself cannot wait.
    return not isinstance(greenlet.getcurrent(), gevent.hub.Hub)


def wait(descriptor: int, seconds: float | None) -> None:
    """Wait until the descriptor is readable, at most that many seconds; None: without limit."""
    hub = gevent.get_hub()
    watcher = hub.loop.io(descriptor, 1)
    try:
        with gevent.Timeout(seconds, False):
            hub.wait(watcher)
    finally:
        watcher.close()


def pause() -> None:
    """Let other greenlets run for a moment."""
    gevent.sleep(0.01)


def epoll() -> select.epoll:
    """A new epoll. gevent removes it from the standard library, because its waits would block all greenlets."""
    made: select.epoll = gevent.monkey.get_original("select", "epoll")()
    return made


def flow() -> int:
    """A number that identifies this greenlet among those that exist."""
    return id(greenlet.getcurrent())
