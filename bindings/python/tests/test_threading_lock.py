"""Locks in the place of ``threading.Lock``.

CPython's own cases for that, ``BaseLockTests`` and ``LockTests`` of ``Lib/test/lock_tests.py``, and what
becomes of each here:

========================= ===================================================================================
test_constructor          cannot be: a distributed lock has a key. Without one it is a TypeError (held here).
test_constructor_noargs   cannot be, for the same reason.
test_repr                 held in substance: the repr says what is locked and that it is idle, not an address.
test_locked_repr          held in substance: the repr says that it is held, and for how long.
test_acquire_destroy      held, but for a ResourceWarning: the hold outlives its object until the lease is over.
test_acquire_release      held
test_try_acquire          held
test_try_acquire_contended held
test_acquire_contended    held
test_with                 held
test_thread_leak          held
test_timeout              held, math.inf apart, which waits forever here and is an OverflowError there
test_weakref_exists       held
test_weakref_deleted      held
test_reacquire            held
test_different_thread     held
test_state_after_timeout  held
test_at_fork_reinit       cannot be: ``_at_fork_reinit`` is CPython's own hook. Forks are in test_processes.py.
========================= ===================================================================================
"""

import gc
import math
import threading
import time
import weakref

import nblock
import pytest
from conftest import Background, eventually


@pytest.fixture
def lock(key):
    return nblock.Lock(key)


def test_constructor(key):
    with pytest.raises(TypeError):
        nblock.Lock()
    with pytest.raises(TypeError):
        nblock.Lock(key, True)


def test_repr(lock, key):
    assert repr(lock) == f"<nblock.Lock {key!r} idle>"
    lock.acquire()
    assert repr(lock).startswith(f"<nblock.Lock {key!r} held, ")
    lock.release()
    assert repr(lock) == f"<nblock.Lock {key!r} idle>"


def test_acquire_destroy(key):
    lock = nblock.Lock(key, expire=0.1)
    lock.acquire()
    with pytest.warns(ResourceWarning, match="was garbage-collected while it was held"):
        del lock
        gc.collect()
    # The lease is over at its time, and not before.
    with nblock.Lock(key, timeout=30):
        pass


def test_acquire_release(lock):
    assert lock.acquire() is True
    assert lock.locked()
    assert lock.release() is None
    assert not lock.locked()


def test_try_acquire(lock):
    assert lock.acquire(False) is True
    lock.release()
    assert lock.acquire(blocking=False) is True
    lock.release()
    assert lock.acquire(0) is True
    assert lock.acquire(0) is False
    lock.release()


def test_try_acquire_contended(lock):
    lock.acquire()
    assert Background(lock.acquire, False).result() is False
    lock.release()


def test_acquire_contended(lock):
    lock.acquire()
    finished = []

    def work():
        lock.acquire()
        lock.release()
        finished.append(threading.get_ident())

    threads = [Background(work) for _ in range(5)]
    assert finished == []
    lock.release()
    for thread in threads:
        thread.result()
    assert len(finished) == 5


def test_with(lock):
    def leave(error=None):
        with lock:
            assert lock.locked()
            if error is not None:
                raise error

    leave()
    assert not lock.locked()
    # An exception leaves it unlocked as well.
    with pytest.raises(TypeError):
        leave(TypeError())
    assert not lock.locked()


def test_thread_leak(lock):
    # More acquiring threads than could be remembered one by one.
    def work():
        lock.acquire()
        lock.release()

    work()
    before = threading.active_count()
    for _ in range(5):
        for thread in [Background(work) for _ in range(15)]:
            thread.result()
    assert threading.active_count() == before


def test_timeout(lock):
    for wrong in [(False, 1), (True, -100), (False, 0), (True, math.nan)]:
        with pytest.raises(ValueError):
            lock.acquire(*wrong)
    for wrong in [1e100, threading.TIMEOUT_MAX + 1]:
        with pytest.raises(OverflowError):
            lock.acquire(timeout=wrong)
    with pytest.raises(TypeError):
        lock.acquire(timeout="1")
    for timeout in [threading.TIMEOUT_MAX, -1, -1.0, 5, 0, math.inf]:
        assert lock.acquire(timeout=timeout) is True
        lock.release()
    lock.acquire()
    start = time.monotonic()
    assert Background(lock.acquire, True, 0.2).result() is False
    assert time.monotonic() - start >= 0.2
    assert Background(lock.acquire, True, 0).result() is False
    lock.release()


def test_weakrefs(lock, key):
    ref = weakref.ref(lock)
    assert ref() is lock
    other = nblock.Lock(key)
    other_ref = weakref.ref(other)
    del other
    gc.collect()
    assert other_ref() is None


def test_reacquire(lock):
    # Not reentrant: the second acquire of one thread waits for another thread's release.
    phase = []

    def work():
        lock.acquire()
        phase.append(None)
        lock.acquire()
        phase.append(None)

    thread = Background(work)
    eventually(lambda: len(phase) == 1)
    assert not lock.acquire(timeout=0.05)
    assert len(phase) == 1
    lock.release()
    thread.result()
    assert len(phase) == 2
    lock.release()


def test_different_thread(lock):
    lock.acquire()
    Background(lock.release).result()
    lock.acquire()
    lock.release()


def test_release_of_an_idle_lock_is_a_runtime_error(lock):
    with pytest.raises(RuntimeError):
        lock.release()
    lock.acquire()
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()


def test_state_after_timeout(lock):
    lock.acquire()
    assert not Background(lock.acquire, True, 0.01).result()
    lock.release()
    assert not lock.locked()
    assert lock.acquire(blocking=False)
    lock.release()


def test_condition_over_a_lock(lock):
    """threading.Condition takes any lock with acquire and release."""
    condition = threading.Condition(lock)
    items = []

    def consume():
        with condition:
            while not items:
                condition.wait()
            return items.pop()

    consumer = Background(consume)
    with condition:
        items.append("item")
        condition.notify()
    assert consumer.result() == "item"
