"""What goes wrong, as exceptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._nblock import Record


class Error(Exception):
    """The base of all errors of this package.

    Wrong arguments are the built-in TypeError and ValueError instead.
    """

    #: The name of the C library's status, such as "NBL_ERR_INDETERMINATE".
    status: str = ""


class LockUnavailable(Error, TimeoutError):
    """The lock was not granted: somebody else held it, for as long as the call waited.

    The message names the holder, and says when that is this very thread, this process, or a parent of it.
    """

    #: The holder's record, as the store had it then; None when the store did not say.
    holder: Record | None = None

    def __reduce__(self) -> Any:
        # A record is of this process's store alone.
        return type(self), self.args, {**self.__dict__, "holder": None}


class LostLock(Error):
    """The hold ended without our unlock: its lease ran out and another took it over, or it was broken."""


class LockInvalidOp(Error, RuntimeError):
    """The call does not fit the state: already locked, not locked, client closed."""


class StoreError(Error, ConnectionError):
    """The store could not be reached, refused, or did not answer in time.

    ``status`` tells these apart: "NBL_ERR_UNREACHABLE" (nothing was applied), "NBL_ERR_INDETERMINATE" (it
    may or may not have been), "NBL_ERR_DENIED", "NBL_ERR_STORE", "NBL_ERR_RESOURCES".
    """


class ForkedError(Error):
    """The hold belongs to the process that this one was forked from. Told once; the lock is idle then."""


for _class in (Error, LockUnavailable, LostLock, LockInvalidOp, StoreError, ForkedError):
    _class.__module__ = "nblock"
del _class
