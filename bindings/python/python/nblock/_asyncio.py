"""Locks for asyncio. They wait for the descriptors of operations, in the running loop."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from . import _default
from ._errors import Error, LockInvalidOp, LockUnavailable, LostLock
from ._nblock import Client, Lock, Op
from ._seconds import Seconds
from ._watch import new_epoll

#: How long finding the holder of a lock for an error message may take, in seconds, beyond the lock's own timeout.
_NAMING = 0.25


async def connect(
    url: str | None = None,
    *,
    expire: Seconds | None = None,
    timeout: Seconds | None = None,
    app: str | None = None,
    op_timeout: Seconds | None = None,
    connect_timeout: Seconds | None = None,
) -> Client:
    """Open a client without blocking the loop. The arguments, and what is raised, are those of Client."""
    op = Client._start(
        url,
        expire=expire,
        timeout=timeout,
        app=app,
        op_timeout=op_timeout,
        connect_timeout=connect_timeout,
    )
    await _ended(op)
    return op.take_client()


async def _ended(op: Op) -> None:
    """Wait until an operation has ended; cancel it if the task is cancelled."""
    try:
        while not op.finish():
            loop = asyncio.get_running_loop()
            readable: asyncio.Future[None] = loop.create_future()
            descriptor = op.fileno()
            loop.add_reader(descriptor, _wake, readable)
            try:
                await readable
            finally:
                loop.remove_reader(descriptor)
    except BaseException:
        op.cancel()
        raise


def _wake(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


class AsyncLock:
    """A distributed lock for asyncio: one program's object for one key.

    key, expire, timeout, auto_refresh, fence and client are those of Lock.

    on_lost is called by the loop, as on_lost(lock), when the hold is no longer certainly ours; and again each
    time that happens after it was recovered. With cancel_on_lost, the task whose ``async with`` block holds the
    lock is cancelled then, and leaving the block raises LostLock.

    Nothing here blocks the loop. Cancelling a call that waits for a grant leaves nothing in the store. One object
    may be shared by the tasks of a loop, and used by one loop after another. It can be used in place of an
    asyncio.Lock, for example in an asyncio.Condition.
    """

    def __init__(
        self,
        key: str,
        *,
        expire: Seconds | None = None,
        timeout: Seconds | None = None,
        auto_refresh: bool | None = None,
        fence: bool | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
        cancel_on_lost: bool = False,
        client: Client | None = None,
    ) -> None:
        # This only checks the callable. Lock does not get it, and does not call it.
        Lock._check_on_lost(on_lost)
        self._lock = Lock(
            key, expire=expire, timeout=timeout, auto_refresh=auto_refresh, fence=fence, client=client
        )
        self._has_client = client is not None
        self._on_lost = on_lost
        self._cancel_on_lost = cancel_on_lost
        self._watched: tuple[asyncio.AbstractEventLoop, select.epoll] | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._body: _Body | None = None

    async def try_lock(self, *, expire: Seconds | None = None) -> bool:
        """Try once to take the lock, as a plain lease. Return True if it is held now, False if another holder has it.

        expire is the length of the lease in seconds, if it differs from the object's. Raises LockInvalidOp if this
        object already holds the lock, StoreError if the store does not reply.
        """
        try:
            await self._take(blocking=False, expire=expire)
        except LockUnavailable:
            return False
        return True

    async def lock(self, *, expire: Seconds | None = None, timeout: Seconds | None = None) -> None:
        """Take the lock, as a plain lease, and wait for it; see Lock.lock."""
        await self._take(expire=expire, timeout=timeout)

    async def unlock(self) -> None:
        """Release the hold; see Lock.unlock. If the task is cancelled, the release continues."""
        self._unwatch()
        await _ended(self._lock._start_unlock())

    async def acquire(self) -> bool:
        """Take the lock as asyncio.Lock.acquire does, and return True. Waits without limit.

        If other tasks use this object, waits for its turn. The hold is renewed until release, unless the lock was
        made with an expire.
        """
        await self._take(scoped=True, timeout=float("inf"), in_block=False)
        return True

    def release(self) -> None:
        """Release the hold as asyncio.Lock.release does, without waiting for the store's reply.

        Raises what Lock.unlock raises if that is known at once, as on one machine. An error that the store reports
        later is passed to the loop's exception handler.
        """
        self._unwatch()
        op = self._lock._start_unlock()
        if not op.finish():
            self._releasing = asyncio.get_running_loop().create_task(self._released(op))

    async def refresh(self, *, expire: Seconds | None = None) -> None:
        """Renew the hold; see Lock.refresh. If the task is cancelled, the renewal continues."""
        await _ended(self._lock._start_refresh(expire=expire))

    async def ask_fence(self) -> int:
        """Return the fence of the hold; ask the store for one if the grant brought none. See Lock.fence."""
        op = self._lock._start_fence()
        await _ended(op)
        return op.fence()

    def locked(self) -> bool:
        """Return whether this object is locked; also True if the hold is overdue."""
        return self._lock.locked()

    @property
    def key(self) -> str:
        """The key."""
        return self._lock.key

    @property
    def held(self) -> bool:
        """Whether the lock is held, and certainly ours at this moment."""
        return self._lock.held

    @property
    def lost(self) -> bool:
        """Whether the hold can no longer be relied on; see Lock.lost."""
        return self._lock.lost

    @property
    def state(self) -> str:
        """The state of this object; see Lock.state."""
        return self._lock.state

    @property
    def remaining(self) -> float:
        """For how many seconds the hold is certainly ours; 0.0 if it is not, or if there is no hold."""
        return self._lock.remaining

    @property
    def fence(self) -> int:
        """The fence that the grant brought: always, but on RethinkDB only with fence=True.

        Raises LockInvalidOp if the lock is not held, or if the store must be asked: see ask_fence.
        """
        op = self._lock._start_fence()
        if not op.finish():
            raise LockInvalidOp("the grant brought no fence: make the lock with fence=True, or await ask_fence()")
        return op.fence()

    async def __aenter__(self) -> AsyncLock:
        await self._take(scoped=True)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        body = self._body
        self._unwatch()
        for_loss = body is not None and body.cancelled_for_loss(exc_type)
        try:
            await _ended(self._lock._start_unlock())
        except LockInvalidOp:
            # The body has unlocked it, or closed its client: there is nothing to release.
            pass
        except Error as error:
            if for_loss and isinstance(error, LostLock):
                raise error from exc
            if exc is None:
                raise
            if hasattr(exc, "add_note"):
                exc.add_note(f"on leaving the block: {error}")
        if for_loss:
            raise LostLock(f"the hold on {self.key!r} became overdue, and its block was cancelled") from exc

    def __repr__(self) -> str:
        return repr(self._lock).replace("nblock.Lock", "nblock.AsyncLock", 1)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AsyncLock cannot be pickled or copied: pass its key, and make an AsyncLock where it is needed"
        )

    async def _released(self, op: Op) -> None:
        try:
            await _ended(op)
        except Error as error:
            context = {"message": f"releasing {self!r} went wrong", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    async def _take(
        self,
        *,
        scoped: bool = False,
        in_block: bool = True,
        blocking: bool = True,
        expire: Seconds | None = None,
        timeout: Seconds | None = None,
    ) -> None:
        if not self._has_client:
            if not _default.present():
                asked = _default.options()
                _default.adopt(asked, await connect(**asked))
            self._has_client = True
        op = self._lock._start_lock(scoped=scoped, blocking=blocking, expire=expire, timeout=timeout)
        try:
            await _ended(op)
        except LockUnavailable:
            if not blocking:
                raise
            raise await self._unavailable() from None
        # Nothing waits from here to the return to the caller: the grant cannot be left without a holder.
        cancels = scoped and in_block and self._cancel_on_lost
        if self._on_lost is not None or cancels:
            try:
                self._watch(_Body() if cancels else None)
            except BaseException:
                self._lock._start_unlock()
                raise

    async def _unavailable(self) -> LockUnavailable:
        """The error for a lock that was not granted; it names the holder if the store reports it soon enough."""
        op = self._lock._start_find()
        try:
            await asyncio.wait_for(_ended(op), _NAMING)
        except (Error, asyncio.TimeoutError):
            pass
        return self._lock._unavailable(op)

    def _watch(self, body: _Body | None) -> None:
        self._unwatch()
        loop, epoll = asyncio.get_running_loop(), new_epoll()
        # An edge for each time that the hold becomes overdue or lost, and nothing while it stays so.
        epoll.register(self._lock._lost_fileno(), select.EPOLLIN | select.EPOLLET)
        loop.add_reader(epoll.fileno(), self._tell, epoll)
        self._watched = (loop, epoll)
        self._body = body

    def _unwatch(self) -> None:
        if self._watched is not None:
            loop, epoll = self._watched
            self._watched = None
            if not loop.is_closed():
                loop.remove_reader(epoll.fileno())
            epoll.close()
        self._body = None

    def _tell(self, epoll: select.epoll) -> None:
        """Called once each time the hold is no longer certainly ours."""
        if epoll.closed or not epoll.poll(0) or not self._lock.lost:
            return
        if self._body is not None:
            self._body.cancel()
        if self._on_lost is not None:
            self._on_lost(self)


class _Body:
    """The task of a block that is cancelled when the hold is lost."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("cancel_on_lost needs a task to cancel: run this code in a task of asyncio")
        self._task: asyncio.Task[Any] = task
        self._cancelled = False
        # Python 3.10 does not count how often a task is to be cancelled.
        self._cancelling: int = task.cancelling() if hasattr(task, "cancelling") else 0

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def cancelled_for_loss(self, exc_type: type[BaseException] | None) -> bool:
        """Whether the block ends because of our cancellation alone. Takes our cancellation back."""
        if not self._cancelled:
            return False
        others = self._task.uncancel() > self._cancelling if hasattr(self._task, "uncancel") else False
        return exc_type is asyncio.CancelledError and not others


AsyncLock.__module__ = "nblock"
connect.__module__ = "nblock"
