"""asyncio, with its own loop and with uvloop."""

import asyncio
import gc
import threading
import warnings

import nblock
import pytest
import uvloop
from conftest import eventually


@pytest.fixture(params=["asyncio", "uvloop"])
def go(request):
    """Runs a coroutine in a new loop."""

    def run(coroutine):
        loop = asyncio.new_event_loop() if request.param == "asyncio" else uvloop.new_event_loop()
        try:
            return loop.run_until_complete(asyncio.wait_for(coroutine, 60))
        finally:
            loop.close()

    return run


async def granted_soon(lock):
    while not lock.held:
        await asyncio.sleep(0.005)


async def pending_soon(lock):
    while lock.state != "pending":
        await asyncio.sleep(0.005)


def test_with(go, key):
    async def main():
        lock = nblock.AsyncLock(key)
        async with lock as held:
            assert held is lock and lock.held and lock.locked() and not lock.lost
            assert lock.key == key and 30 < lock.remaining <= 60 and lock.state == "held"
            assert lock.fence == await lock.ask_fence() > 0
            assert nblock.find(key).fence == lock.fence
        assert not lock.held and nblock.find(key) is None
        with pytest.raises(nblock.LockInvalidOp):
            lock.fence  # noqa: B018

    go(main())


def test_bare_forms(go, key):
    async def main():
        lock, other = nblock.AsyncLock(key, expire=10), nblock.AsyncLock(key)
        assert await lock.try_lock() is True
        assert await other.try_lock() is False
        with pytest.raises(nblock.LockUnavailable):
            await other.lock(timeout=0.01)
        with pytest.raises(nblock.LockInvalidOp, match="already locked"):
            await lock.lock()
        await lock.refresh(expire=100)
        assert 50 < lock.remaining <= 100
        await lock.unlock()
        await other.lock(expire=5)
        assert 0 < other.remaining <= 5
        await other.unlock()
        for call in (lock.unlock, lock.refresh):
            with pytest.raises(nblock.LockInvalidOp, match="not locked"):
                await call()

    go(main())


def test_the_loop_runs_while_a_task_waits(go, key):
    async def main():
        holder, waiter = nblock.AsyncLock(key), nblock.AsyncLock(key)
        await holder.lock()
        waiting = asyncio.create_task(waiter.lock())
        await pending_soon(waiter)
        threads = threading.active_count()
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert threading.active_count() == threads == 1, "no foreign thread calls Python"
        await holder.unlock()
        await waiting
        await waiter.unlock()

    go(main())


def test_tasks_that_share_an_object_take_turns(go, key):
    async def main():
        lock = nblock.AsyncLock(key)
        inside = done = 0

        async def work():
            nonlocal inside, done
            for _ in range(10):
                async with lock:
                    inside += 1
                    assert inside == 1
                    await asyncio.sleep(0)
                    inside -= 1
                    done += 1

        await asyncio.gather(*(work() for _ in range(10)))
        assert done == 100

    go(main())


@pytest.mark.parametrize("form", ["lock", "with"])
def test_cancelling_leaves_nothing(go, key, form):
    async def main():
        holder, waiter = nblock.AsyncLock(key), nblock.AsyncLock(key)

        async def wait():
            if form == "lock":
                await waiter.lock(timeout=1e6)
            else:
                async with waiter:
                    raise AssertionError("it was held")

        await holder.lock()
        task = asyncio.create_task(wait())
        await pending_soon(waiter)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert waiter.state == "idle"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiter.lock(timeout=1e6), 0.02)
        assert waiter.state == "idle"
        await holder.unlock()
        assert nblock.find(key) is None
        assert await waiter.try_lock()
        await waiter.unlock()

    go(main())


def test_a_cancel_that_meets_the_grant_leaves_nothing(go, key):
    """Cancelled in every order with the grant: the caller has the hold, or nobody has."""

    async def main():
        holder, waiter = nblock.AsyncLock(key), nblock.AsyncLock(key)
        outcomes = set()
        for turn in range(60):
            await holder.lock()
            task = asyncio.create_task(waiter.lock())
            await pending_soon(waiter)
            await holder.unlock()
            if turn % 3 == 1:
                # Another process is granted nothing either: the grant has come, the task was not resumed.
                while nblock.find(key) is None and not task.done():
                    pass
            elif turn % 3 == 2:
                await asyncio.sleep(0.0001 * turn)
            task.cancel()
            try:
                await task
                outcomes.add("granted")
                await waiter.unlock()
            except asyncio.CancelledError:
                outcomes.add("cancelled")
            while nblock.find(key) is not None:
                await asyncio.sleep(0.001)
            assert waiter.state == "idle"
        assert "cancelled" in outcomes

    go(main())


def test_synchronized(go, key):
    @nblock.synchronized(key)
    async def work(value):
        """What it does."""
        assert nblock.find(key) is not None
        await asyncio.sleep(0)
        return value * 2

    async def main():
        assert await asyncio.gather(*(work(value) for value in range(5))) == [0, 2, 4, 6, 8]
        assert asyncio.iscoroutinefunction(work) and work.__doc__ == "What it does."

    go(main())
    assert nblock.find(key) is None


def test_an_object_serves_one_loop_after_the_other(go, key):
    lock = nblock.AsyncLock(key)

    async def main():
        async with lock:
            pass

    for _ in range(3):
        go(main())


def test_connect(go, key):
    async def main():
        client = await nblock.connect("memory:", expire=7, app="tester")
        async with nblock.AsyncLock(key, client=client) as lock:
            assert 0 < lock.remaining <= 7
            assert client.find(key).app == "tester"
        client.close()
        with pytest.raises(ValueError):
            await nblock.connect("nowhere:")

    go(main())


def test_on_lost_is_called_by_the_loop(go, key):
    async def main():
        told = []
        lock = nblock.AsyncLock(key, expire=0.05, on_lost=lambda lock: told.append(threading.get_ident()))
        await lock.lock()
        while not told:
            await asyncio.sleep(0.005)
        assert lock.lost and told == [threading.get_ident()]
        # Once a hold; and the next one is another.
        await lock.refresh(expire=60)
        await lock.unlock()
        await lock.lock(expire=60)
        await lock.unlock()
        assert len(told) == 1

    go(main())


def test_a_condition_over_it(go, key):
    async def main():
        condition = asyncio.Condition(nblock.AsyncLock(key))
        ready, seen = [], []

        async def consume():
            async with condition:
                await condition.wait_for(lambda: ready)
                # Held again after the wait.
                assert condition.locked() and nblock.find(key) is not None
                seen.append(ready.pop())

        consumers = [asyncio.create_task(consume()) for _ in range(3)]
        for item in range(3):
            # The waiters have released it.
            async with condition:
                ready.append(item)
                condition.notify()
            while ready:
                await asyncio.sleep(0.001)
        await asyncio.gather(*consumers)
        assert seen == [0, 1, 2]
        assert nblock.find(key) is None
        with pytest.raises(RuntimeError):
            condition.notify()

    go(main())


def test_acquire_and_release(go, key):
    async def main():
        lock = nblock.AsyncLock(key)
        assert await lock.acquire() is True
        assert lock.held and lock.locked()
        # It waits its turn on the object, as asyncio.Lock does.
        second = asyncio.create_task(lock.acquire())
        await asyncio.sleep(0.01)
        assert not second.done()
        lock.release()
        assert await second is True
        nblock.find(key).break_()
        with pytest.raises(nblock.LostLock):
            lock.release()
        with pytest.raises(nblock.LockInvalidOp):
            lock.release()

    go(main())


def test_on_lost_is_called_again_after_a_recovery(go, key):
    async def main():
        told = asyncio.Queue()
        lock = nblock.AsyncLock(key, expire=0.05, on_lost=told.put_nowait)
        await lock.lock()
        for _ in range(3):
            assert await told.get() is lock
            await lock.refresh(expire=0.05)
        assert await told.get() is lock
        await lock.unlock()
        assert told.empty()

    go(main())


def test_a_call_that_holds_up_the_loop_warns(go, key):
    async def main():
        lock = nblock.Lock(key)
        # What is answered at once holds up nothing.
        with lock:
            with pytest.warns(RuntimeWarning, match="use nblock.AsyncLock") as warned:
                assert nblock.Lock(key).acquire(timeout=0.1) is False
            assert warned[0].filename == __file__
            # A thread of its own has no loop.
            assert await asyncio.to_thread(nblock.Lock(key).acquire, timeout=0.1) is False
        with nblock.Lock(key):
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(main())
    # Nor has a thread beside loops.
    with nblock.Lock(key), pytest.raises(nblock.LockUnavailable), warnings.catch_warnings():
        warnings.simplefilter("error")
        nblock.Lock(key).lock(timeout=0.1)


def test_the_body_is_cancelled_at_a_loss(go, key):
    async def main():
        ended = []
        with pytest.raises(nblock.LostLock) as caught:
            async with nblock.AsyncLock(key, expire=0.05, cancel_on_lost=True):
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.append(True)
        assert ended == [True]
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        # The task goes on: it was cancelled for the block alone.
        await asyncio.sleep(0.01)
        assert nblock.find(key) is None

    go(main())


def test_who_is_cancelled_by_others_too_stays_cancelled(go, key):
    async def body():
        async with nblock.AsyncLock(key, cancel_on_lost=True):
            await asyncio.sleep(60)

    async def main():
        task = asyncio.create_task(body())
        while nblock.find(key) is None:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert nblock.find(key) is None

    go(main())


def test_leaving_after_a_loss_raises_unless_the_body_did(go, key):
    async def main():
        with pytest.raises(nblock.LostLock):
            async with nblock.AsyncLock(key):
                nblock.find(key).break_()
        with pytest.raises(KeyError) as caught:
            async with nblock.AsyncLock(key):
                nblock.find(key).break_()
                raise KeyError
        notes = getattr(caught.value, "__notes__", None)
        assert notes is None or "lost" in notes[0]

    go(main())


def test_a_forgotten_hold_warns(go, key):
    async def main():
        lock = nblock.AsyncLock(key, expire=0.05)
        await lock.lock()
        with pytest.warns(ResourceWarning, match="was garbage-collected while it was held"):
            del lock
            gc.collect()

    go(main())
    eventually(lambda: nblock.find(key).expired)
