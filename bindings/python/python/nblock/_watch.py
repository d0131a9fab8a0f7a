"""Notification of lost holds: ``on_lost`` is called in a Python thread of this package."""

from __future__ import annotations

import os
import select
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._nblock import Lock


def _beside_greenlets() -> bool:
    """Whether threads are greenlets here, because gevent has replaced them."""
    return "gevent.monkey" in sys.modules and bool(_gevent().wanted())


def _gevent() -> Any:
    from . import _gevent

    return _gevent


def new_epoll() -> select.epoll:
    """A new epoll, also if gevent has removed it from the standard library."""
    return _gevent().epoll() if "gevent.monkey" in sys.modules else select.epoll()


class _Watcher:
    """One thread that waits for the descriptors of all holds that have an on_lost."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may lock while its thread is in here.
        self._mutex = threading.RLock()
        self._epoll: select.epoll | None = None
        # Weak: a lock that is watched can be collected like any other. What to call is stored in the lock.
        self._holds: dict[int, weakref.ref[Lock]] = {}

    def watch(self, descriptor: int, lock: Lock) -> None:
        with self._mutex:
            if self._epoll is None:
                # Set first: if threads are greenlets, starting one lets others run.
                self._epoll = epoll = new_epoll()
                try:
                    threading.Thread(target=self._run, args=(epoll,), name="nblock-watch", daemon=True).start()
                except BaseException:
                    self._epoll = None
                    epoll.close()
                    raise
            self._holds[descriptor] = weakref.ref(lock)
            # One edge each time the hold becomes overdue or lost: a hold that was recovered is still watched. If the
            # last hold was not unlocked by us, the descriptor is still registered.
            events = select.EPOLLIN | select.EPOLLET
            try:
                self._epoll.register(descriptor, events)
            except FileExistsError:
                self._epoll.modify(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        with self._mutex:
            if self._holds.pop(descriptor, None) and self._epoll:
                self._epoll.unregister(descriptor)

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()

    def _run(self, epoll: select.epoll) -> None:
        while True:
            if _beside_greenlets():
                _gevent().wait(epoll.fileno(), None)
            for descriptor, _ in epoll.poll(0 if _beside_greenlets() else None):
                self._tell(descriptor)

    def _tell(self, descriptor: int) -> None:
        with self._mutex:
            ref = self._holds.get(descriptor)
            lock = ref() if ref else None
            # Not lost: the event was for an earlier hold, and the present one is still watched.
            if lock is None or lock._on_lost is None or not lock.lost:
                return
        # A thread of its own: a slow on_lost must not delay others.
        threading.Thread(target=lock._on_lost, args=(lock,), name="nblock-on-lost", daemon=True).start()


_watcher = _Watcher()


def watch(descriptor: int, lock: Lock) -> None:
    """Call the lock's on_lost when the descriptor becomes readable."""
    _watcher.watch(descriptor, lock)


def unwatch(descriptor: int) -> None:
    """Stop watching: the hold has ended."""
    _watcher.unwatch(descriptor)


def _after_fork() -> None:
    """Start again in a forked child: it has neither the parent's thread nor its holds."""
    global _watcher
    _watcher.close()
    _watcher = _Watcher()


os.register_at_fork(after_in_child=_after_fork)
