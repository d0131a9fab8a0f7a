"""Locks for asyncio: over the descriptors of operations, in the running loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any

from . import _default
from ._errors import Error, LockInvalidOp, LockUnavailable, LostLock
from ._nblock import Client, Lock, Op


async def connect(
    url: str | None = None,
    *,
    expire: float | None = None,
    timeout: float | None = None,
    app: str | None = None,
) -> Client:
    """Open a client without blocking the loop; see Client for the arguments."""
    op = Client._start(url, expire=expire, timeout=timeout, app=app)
    await _ended(op)
    return op.take_client()


async def _ended(op: Op) -> None:
    """Wait until an operation has ended; give it up when the task is cancelled."""
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

    key, expire, timeout, auto_refresh, fence and client are those of Lock. on_lost: called as
    on_lost(lock), by the loop, when a hold is not certainly ours any more. cancel_on_lost: whether the
    task whose ``async with`` block holds the lock is cancelled then; leaving the block raises LostLock.

    Nothing here blocks the loop. Cancelling a call that waits for a grant leaves nothing behind. May be
    shared by the tasks of a loop, and used by one loop after the other.
    """

    def __init__(
        self,
        key: str,
        *,
        expire: float | None = None,
        timeout: float | None = None,
        auto_refresh: bool | None = None,
        fence: bool | None = None,
        on_lost: Callable[[AsyncLock], object] | None = None,
        cancel_on_lost: bool = False,
        client: Client | None = None,
    ) -> None:
        # Checks the callable, as all arguments; it is not called from there, since it is not handed on.
        Lock._check_on_lost(on_lost)
        self._lock = Lock(
            key, expire=expire, timeout=timeout, auto_refresh=auto_refresh, fence=fence, client=client
        )
        self._has_client = client is not None
        self._on_lost = on_lost
        self._cancel_on_lost = cancel_on_lost
        self._watched: tuple[asyncio.AbstractEventLoop, int] | None = None
        self._body: _Body | None = None

    async def try_lock(self, *, expire: float | None = None) -> bool:
        """Try once to take the lock, for a plain lease. False: somebody else holds it.

        Raises LockInvalidOp when this object holds it already, StoreError when the store does not answer.
        """
        try:
            await self._take(blocking=False, expire=expire)
        except LockUnavailable:
            return False
        return True

    async def lock(self, *, expire: float | None = None, timeout: float | None = None) -> None:
        """Take the lock, for a plain lease, and wait for it; see Lock.lock."""
        await self._take(expire=expire, timeout=timeout)

    async def unlock(self) -> None:
        """Give the hold back; see Lock.unlock. Cancelled, it goes on all the same."""
        self._unwatch()
        await _ended(self._lock._start_unlock())

    async def refresh(self, *, expire: float | None = None) -> None:
        """Renew the hold; see Lock.refresh. Cancelled, it goes on all the same."""
        await _ended(self._lock._start_refresh(expire=expire))

    async def ask_fence(self) -> int:
        """The fence of the hold, asked for where the grant brought none; see Lock.fence."""
        op = self._lock._start_fence()
        await _ended(op)
        return op.fence()

    def locked(self) -> bool:
        """Whether this object is locked, be it overdue."""
        return self._lock.locked()

    @property
    def key(self) -> str:
        """What is locked."""
        return self._lock.key

    @property
    def held(self) -> bool:
        """Whether the lock is held, and certainly ours at this moment."""
        return self._lock.held

    @property
    def lost(self) -> bool:
        """Whether there was a hold that cannot be relied on any more; see Lock.lost."""
        return self._lock.lost

    @property
    def state(self) -> str:
        """The state of this object; see Lock.state."""
        return self._lock.state

    @property
    def remaining(self) -> float:
        """For how many seconds the hold is certainly ours; 0.0 when it is not, or not held."""
        return self._lock.remaining

    @property
    def fence(self) -> int:
        """The fence that the grant brought: on one machine always, elsewhere with fence=True.

        Raises LockInvalidOp when it is not locked, or when the store has to be asked: see ask_fence.
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
            # The body has unlocked it, or closed its client: nothing is left.
            pass
        except Error as error:
            if for_loss and isinstance(error, LostLock):
                raise error from exc
            if exc is None:
                raise
            if hasattr(exc, "add_note"):
                exc.add_note(f"on leaving the block: {error}")
        if for_loss:
            raise LostLock(f"the hold on {self.key!r} was overdue, and its block was cancelled") from exc

    def __repr__(self) -> str:
        return repr(self._lock).replace("nblock.Lock", "nblock.AsyncLock", 1)

    async def _take(
        self,
        *,
        scoped: bool = False,
        blocking: bool = True,
        expire: float | None = None,
        timeout: float | None = None,
    ) -> None:
        if not self._has_client:
            if not _default.present():
                asked = _default.options()
                _default.adopt(asked, await connect(**asked))
            self._has_client = True
        await _ended(self._lock._start_lock(scoped=scoped, blocking=blocking, expire=expire, timeout=timeout))
        # From here to the caller nothing waits: the grant cannot be left without a holder.
        if self._on_lost is not None or (scoped and self._cancel_on_lost):
            try:
                self._watch(_Body() if scoped and self._cancel_on_lost else None)
            except BaseException:
                self._lock._start_unlock()
                raise

    def _watch(self, body: _Body | None) -> None:
        loop, descriptor = asyncio.get_running_loop(), self._lock._lost_fileno()
        loop.add_reader(descriptor, self._tell)
        self._watched = (loop, descriptor)
        self._body = body

    def _unwatch(self) -> None:
        if self._watched is not None:
            loop, descriptor = self._watched
            self._watched = None
            if not loop.is_closed():
                loop.remove_reader(descriptor)
        self._body = None

    def _tell(self) -> None:
        """The hold is not certainly ours any more. Called once a hold."""
        if self._watched is not None:
            loop, descriptor = self._watched
            self._watched = None
            loop.remove_reader(descriptor)
        if self._body is not None:
            self._body.cancel()
        if self._on_lost is not None:
            self._on_lost(self)


class _Body:
    """The task that runs a block which is to be cancelled at a loss."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("cancel_on_lost needs a task that it can cancel, and this code runs in none")
        self._task: asyncio.Task[Any] = task
        self._cancelled = False
        # Python 3.10 does not count how often a task is to be cancelled.
        self._cancelling: int = task.cancelling() if hasattr(task, "cancelling") else 0

    def cancel(self) -> None:
        self._cancelled = True
        self._task.cancel()

    def cancelled_for_loss(self, exc_type: type[BaseException] | None) -> bool:
        """Whether the block ends with our cancellation, and nobody else's; takes ours back."""
        if not self._cancelled:
            return False
        others = self._task.uncancel() > self._cancelling if hasattr(self._task, "uncancel") else False
        return exc_type is asyncio.CancelledError and not others


AsyncLock.__module__ = "nblock"
connect.__module__ = "nblock"
