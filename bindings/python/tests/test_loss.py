"""Losing a hold: who is notified, when, and how."""

import gc
import sys
import threading
import weakref

import nblock
import pytest
from conftest import eventually


def break_it(key):
    assert nblock.find(key).break_()


def test_the_state_tells(key):
    lock = nblock.Lock(key, expire=0.05)
    lock.lock()
    eventually(lambda: lock.lost)
    assert lock.state == "overdue" and not lock.held and lock.locked() and lock.remaining == 0.0
    # Nobody has taken it over: it is renewed as any other.
    lock.refresh(expire=60)
    assert lock.held and not lock.lost
    lock.unlock()


def test_a_renewed_hold_that_is_broken_is_found_lost(key):
    with nblock.Client("memory:", expire=0.3) as client:
        lock = client.lock(key)
        lock.acquire()
        client.find(key).break_()
        eventually(lambda: lock.state == "lost")
        assert lock.lost and not lock.held and not lock.locked()
        with pytest.raises(nblock.LostLock) as caught:
            lock.unlock()
        assert caught.value.status == "NBL_LOST" and key in str(caught.value)
        # Notified once.
        assert lock.state == "idle"
        with pytest.raises(nblock.LockInvalidOp):
            lock.unlock()


def test_refresh_tells(key):
    lock = nblock.Lock(key)
    lock.lock()
    break_it(key)
    with pytest.raises(nblock.LostLock):
        lock.refresh()
    assert lock.state == "idle"


@pytest.mark.parametrize("make", [lambda lock: lock, lambda lock: lock.synchronize(timeout=1)])
def test_leaving_a_block_after_a_loss_raises(key, make):
    lock = nblock.Lock(key)
    with pytest.raises(nblock.LostLock), make(lock):
        break_it(key)
    assert lock.state == "idle"


@pytest.mark.parametrize("make", [lambda lock: lock, lambda lock: lock.synchronize(timeout=1)])
def test_what_the_body_raised_goes_first(key, make):
    lock = nblock.Lock(key)
    with pytest.raises(KeyError) as caught, make(lock):
        break_it(key)
        raise KeyError("the body's")
    if sys.version_info >= (3, 11):
        assert "lost" in caught.value.__notes__[0]
    assert lock.state == "idle"


def test_a_block_that_was_told_already_is_not_told_again(key):
    lock = nblock.Lock(key)
    with lock:
        break_it(key)
        with pytest.raises(nblock.LostLock):
            lock.refresh()
    assert lock.state == "idle"


def test_on_lost_runs_in_a_python_thread_of_its_own(key):
    told, ran = [], threading.Event()

    def on_lost(lock):
        told.append((lock, lock.lost, threading.current_thread()))
        ran.set()

    lock = nblock.Lock(key, expire=0.05, on_lost=on_lost)
    lock.lock()
    assert ran.wait(30)
    [(whose, lost, thread)] = told
    assert whose is lock and lost
    assert isinstance(thread, threading.Thread) and thread is not threading.main_thread()
    lock.unlock()
    # The loss of the next hold is notified again.
    ran.clear()
    lock.lock()
    assert ran.wait(30) and len(told) == 2
    lock.unlock()


def test_on_lost_is_called_again_after_a_recovery(key):
    told = threading.Semaphore(0)
    lock = nblock.Lock(key, expire=0.05, on_lost=lambda lock: told.release())
    lock.lock()
    for _ in range(3):
        # Overdue: notified. Refreshed, it is ours as before, and will be overdue again.
        assert told.acquire(timeout=30)
        lock.refresh(expire=0.05)
    assert told.acquire(timeout=30)
    lock.unlock()
    assert not told.acquire(timeout=0)


def test_on_lost_is_called_once_for_what_is_overdue_and_then_lost(key):
    with nblock.Client("memory:", expire=0.3) as client:
        told, again = [], threading.Event()
        lock = client.lock(key, on_lost=told.append)
        lock.lock(expire=0.05)
        eventually(lambda: told == [lock])
        client.find(key).break_()
        with pytest.raises(nblock.LostLock):
            lock.refresh()
        # Notified of the next hold's loss, and so of all that came before.
        last = client.lock(key + "last", expire=0.05, on_lost=lambda lock: again.set())
        last.lock()
        assert again.wait(30)
        last.unlock()
        assert told == [lock]


def test_on_lost_that_is_slow_or_fails_keeps_nobody_from_being_told(key, monkeypatch):
    failed, release, told = [], threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.exc_type))

    def fail(lock):
        raise KeyError

    locks = [
        nblock.Lock(f"{key}{number}", expire=0.05, on_lost=on_lost)
        for number, on_lost in enumerate([lambda lock: release.wait(30), fail, lambda lock: told.set()])
    ]
    for lock in locks:
        lock.lock()
    assert told.wait(30)
    release.set()
    eventually(lambda: failed == [KeyError])
    for lock in locks:
        lock.unlock()


def test_on_lost_is_not_called_for_what_was_given_back(key):
    told = []
    lock = nblock.Lock(key, on_lost=told.append)
    for _ in range(100):
        with lock:
            pass
        lock.lock(expire=60)
        lock.unlock()
    lost = threading.Event()
    last = nblock.Lock(key, expire=0.05, on_lost=lambda lock: lost.set())
    last.lock()
    assert lost.wait(30)
    last.unlock()
    assert told == []


def test_on_lost_does_not_keep_a_lock_alive(key):
    class Job:
        def __init__(self):
            self.lock = nblock.Lock(key, on_lost=self.stop)

        def stop(self, lock):
            pass

    job = Job()
    ref = weakref.ref(job.lock)
    job.lock.lock()
    with pytest.warns(ResourceWarning, match="was garbage-collected while it was held"):
        del job
        gc.collect()
    assert ref() is None
    break_it(key)


def test_the_parents_watch_is_not_the_childs(key, run):
    program = run(
        """
        import os, sys, threading, nblock
        key = sys.argv[1]
        notified = threading.Event()
        lock = nblock.Lock(key, expire=0.3, on_lost=lambda lock: notified.set())
        lock.lock()
        pid = os.fork()
        if pid == 0:
            mine = nblock.Lock(key + "child", expire=0.05, on_lost=lambda lock: notified.set())
            mine.lock()
            os._exit(0 if notified.wait(30) else 1)
        print(os.waitpid(pid, 0)[1], notified.wait(30))
        lock.unlock()
        """,
        key,
    )
    program.expect("0 True")
    assert program.end() == (0, "", "")
