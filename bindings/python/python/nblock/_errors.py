"""The exceptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._nblock import Record


class Error(Exception):
    """The base of all errors of this package.

    Wrong arguments raise the built-in TypeError and ValueError instead.
    """

    #: The name of the C library's status, such as "NBL_ERR_INDETERMINATE".
    status: str = ""


class LockUnavailable(Error, TimeoutError):
    """The lock was not granted: another holder had it for as long as the call waited.

    The message names the holder, and says so if that is this thread, this process, or a parent of it.
    """

    #: The holder's record, as the store had it then; None if the store did not report it.
    holder: Record | None = None

    def __reduce__(self) -> Any:
        # A record can be used with this process's store only.
        return type(self), self.args, {**self.__dict__, "holder": None}


class LostLock(Error):
    """The hold ended without our unlock: its lease ran out and another holder took it over, or it was broken."""


class LockInvalidOp(Error, RuntimeError):
    """The call does not fit the state: already locked, not locked, client closed."""


class StoreError(Error, ConnectionError):
    """The store could not be reached, refused the request, or did not reply in time.

    ``status`` says which: "NBL_ERR_UNREACHABLE" (nothing was applied), "NBL_ERR_INDETERMINATE" (the request may
    or may not have been applied), "NBL_ERR_DENIED", "NBL_ERR_STORE", "NBL_ERR_RESOURCES".
    """


class ForkedError(Error):
    """The hold belongs to the process that this one was forked from. Raised once; the lock is idle afterwards."""


for _class in (Error, LockUnavailable, LostLock, LockInvalidOp, StoreError, ForkedError):
    _class.__module__ = "nblock"
del _class
