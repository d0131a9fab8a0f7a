"""Waiting beside gevent's greenlets. Imported only in programs that have imported gevent."""

from __future__ import annotations

import importlib
import select
from typing import Any

# Whoever checks types need not have these.
gevent: Any = importlib.import_module("gevent")
greenlet: Any = importlib.import_module("greenlet")
for _name in ("gevent.hub", "gevent.monkey"):
    importlib.import_module(_name)


def wanted() -> bool:
    """Whether this thread's waits are to let other greenlets run: gevent is patched in, and this is not its hub."""
    if not gevent.monkey.is_module_patched("threading"):
        return False
    # A callback of the hub itself can wait for nothing.
    return not isinstance(greenlet.getcurrent(), gevent.hub.Hub)


def wait(descriptor: int, seconds: float | None) -> None:
    """Wait until the descriptor is readable, or for so long."""
    hub = gevent.get_hub()
    watcher = hub.loop.io(descriptor, 1)
    try:
        with gevent.Timeout(seconds, False):
            hub.wait(watcher)
    finally:
        watcher.close()


def pause() -> None:
    """Let others run for a moment."""
    gevent.sleep(0.01)


def epoll() -> select.epoll:
    """A new epoll: gevent takes it out of the standard library, since its waits hold up all greenlets."""
    made: select.epoll = gevent.monkey.get_original("select", "epoll")()
    return made


def flow() -> int:
    """A number that no other greenlet has that lives."""
    return id(greenlet.getcurrent())
