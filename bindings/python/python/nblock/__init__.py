"""Distributed locks with leases, timeouts, loss detection and fencing.

    import nblock

    with nblock.Lock("jobs:report"):        # renewed while the block runs
        report()

On one machine, no server is needed. Across machines, the locks are kept in RethinkDB, Redis or PostgreSQL:
see Client and configure. A hold is a lease: it runs out when its holder dies, and a holder that loses it gets
an error.
"""

from __future__ import annotations

from ._asyncio import AsyncLock, connect
from ._default import client as _default_client
from ._default import configure
from ._errors import Error, ForkedError, LockInvalidOp, LockUnavailable, LostLock, StoreError
from ._nblock import Client, Lock, Ping, Record, ReentrantLock, __version__
from ._synchronized import synchronized

__all__ = [
    "AsyncLock",
    "Client",
    "Error",
    "ForkedError",
    "Lock",
    "LockInvalidOp",
    "LockUnavailable",
    "LostLock",
    "Ping",
    "Record",
    "ReentrantLock",
    "StoreError",
    "__version__",
    "configure",
    "connect",
    "expired",
    "find",
    "locks",
    "synchronized",
]


def locks() -> list[Record]:
    """Return all records of the default client's store, in no particular order.

    Waits for the store's reply, at most op_timeout (5 s by default). Raises StoreError.
    """
    return _default_client().locks()


def expired() -> list[Record]:
    """Return the records of the default client's store whose lease has run out.

    Waits for the store's reply, at most op_timeout (5 s by default). Raises StoreError.
    """
    return _default_client().expired()


def find(key: str) -> Record | None:
    """Return the record of a key in the default client's store, or None if there is none.

    A record whose lease has ended is found too. Waits for the store's reply, at most op_timeout (5 s by default). Raises StoreError.
    """
    return _default_client().find(key)


configure.__module__ = "nblock"
