"""What a lock does: one object, one key."""

import contextlib
import math
import os
import pathlib
import pickle
import re
import threading
import time

import nblock
import pytest
from conftest import Background, eventually


def test_with_takes_and_gives_back(key):
    lock = nblock.Lock(key)
    with lock as held:
        assert held is lock
        assert lock.held and lock.locked() and not lock.lost
        assert lock.state == "held"
        assert 30 < lock.remaining <= 60
        assert nblock.find(key).pid == os.getpid()
    assert not lock.held and not lock.locked()
    assert lock.state == "idle"
    assert lock.remaining == 0.0
    assert nblock.find(key) is None


def test_another_object_is_refused_while_it_is_held(key):
    with nblock.Lock(key):
        other = nblock.Lock(key)
        assert other.try_lock() is False
        with pytest.raises(nblock.LockUnavailable) as caught:
            other.lock(timeout=0)
        assert isinstance(caught.value, TimeoutError)
        assert key in str(caught.value)
        with pytest.raises(nblock.LockUnavailable), nblock.Lock(key, timeout=0.01):
            raise AssertionError("it was held")
    assert other.try_lock() is True
    other.unlock()


def test_another_process_is_refused_and_waited_for(key, holder):
    program = holder(key)
    lock = nblock.Lock(key)
    assert lock.try_lock() is False
    assert nblock.find(key).pid == program.process.pid
    waiter = Background(lock.lock)
    program.tell()
    assert waiter.result() is None
    assert lock.held
    lock.unlock()


def test_the_lease_of_a_killed_holder_runs_out(key, holder):
    program = holder(key, expire=0.5)
    program.kill()
    with nblock.Lock(key, timeout=30):
        pass


def test_bare_forms_refuse_what_is_not_idle(key):
    lock = nblock.Lock(key)
    lock.lock()
    for again in (lock.lock, lock.try_lock):
        with pytest.raises(nblock.LockInvalidOp, match="already locked") as caught:
            again()
        assert isinstance(caught.value, RuntimeError)
        assert caught.value.status == "NBL_ERR_INVALID_OP"
    lock.unlock()
    for end in (lock.unlock, lock.refresh, lock.release):
        with pytest.raises(nblock.LockInvalidOp, match="not locked"):
            end()
    with pytest.raises(nblock.LockInvalidOp, match="not locked"):
        lock.fence


def test_timeout_ends_the_wait(key):
    with nblock.Lock(key):
        start = time.monotonic()
        with pytest.raises(nblock.LockUnavailable):
            nblock.Lock(key).lock(timeout=0.2)
        assert time.monotonic() - start >= 0.2


def test_for_ever_is_math_inf(key):
    first, second = nblock.Lock(key), nblock.Lock(key, timeout=math.inf)
    first.lock()
    waiter = Background(second.lock)
    first.unlock()
    waiter.result()
    second.unlock()


def test_refresh_sets_a_new_expiry(key):
    lock = nblock.Lock(key, expire=10)
    lock.lock()
    lock.refresh(expire=100)
    assert 50 < lock.remaining <= 100
    lock.refresh()
    assert 50 < lock.remaining <= 100, "with no argument, the hold's last expire"
    lock.refresh(expire=5)
    assert 0 < lock.remaining <= 5
    lock.unlock()


def assert_renewed(client, lock, renewed):
    """The lease is renewed, or else it runs out."""

    def was_renewed():
        # By more than what the rounding of wall-clock time makes of an unchanged lease.
        return client.find(lock.key).expires_at > first + 0.1

    first = client.find(lock.key).expires_at
    if renewed:
        # It may be overdue meanwhile, on a machine that stands still: it is renewed nevertheless.
        eventually(was_renewed)
    else:
        eventually(lambda: lock.state == "overdue")
        assert not was_renewed()


@pytest.mark.parametrize(
    ("named", "renewed"),
    [
        ({}, True),
        ({"auto_refresh": False}, False),
        ({"expire": 1}, False),
        ({"expire": 1, "auto_refresh": True}, True),
    ],
)
def test_scoped_forms_renew_unless_an_expire_is_named(key, named, renewed):
    with nblock.Client("memory:", expire=1) as client:
        lock = client.lock(key, **named)
        with lock:
            assert_renewed(client, lock, renewed)
        lock.acquire()
        assert_renewed(client, lock, renewed)
        lock.release()


def test_a_call_that_names_an_expire_is_not_renewed(key):
    with nblock.Client("memory:") as client:
        lock = client.lock(key)
        with lock.synchronize(expire=0.2):
            assert_renewed(client, lock, False)


def test_bare_forms_hold_a_plain_lease_unless_asked_to_renew(key):
    with nblock.Client("memory:", expire=1) as client:
        for lock, renewed in (client.lock(key), False), (client.lock(key, auto_refresh=True), True):
            lock.lock()
            assert_renewed(client, lock, renewed)
            lock.unlock()
            assert lock.try_lock()
            assert_renewed(client, lock, renewed)
            lock.unlock()


def test_synchronize_takes_options_of_its_own(key):
    lock = nblock.Lock(key)
    scope = lock.synchronize(expire=5, timeout=1)
    for _ in range(2):
        with scope as held:
            assert held is lock
            assert 0 < lock.remaining <= 5
        assert lock.state == "idle"
    with nblock.Lock(key), pytest.raises(nblock.LockUnavailable), lock.synchronize(timeout=0):
        raise AssertionError("it was held")


def test_a_block_may_unlock_by_itself(key):
    lock = nblock.Lock(key)
    with lock:
        lock.unlock()
        assert nblock.find(key) is None
    assert lock.state == "idle"


def test_threads_that_share_an_object_take_turns(key):
    lock = nblock.Lock(key)
    inside = most = done = 0

    def work():
        nonlocal inside, most, done
        for _ in range(50):
            with lock:
                inside += 1
                most = max(most, inside)
                seen = done
                time.sleep(0)
                done = seen + 1
                inside -= 1

    threads = [Background(work) for _ in range(6)]
    for thread in threads:
        thread.result()
    assert most == 1
    assert done == 300


def test_waiting_lets_other_threads_run(key):
    with nblock.Lock(key):
        waiter = Background(nblock.Lock(key).acquire, True, 0.3)
        ran = 0
        while waiter.is_alive():
            ran += 1
        assert waiter.result() is False
    assert ran > 1000


def test_synchronized_makes_a_lock_per_call(key):
    @nblock.synchronized(key, timeout=0.05)
    def inner(value):
        """What it does."""
        assert nblock.find(key).pid == os.getpid()
        return value * 2

    @nblock.synchronized(key)
    def outer():
        return inner(1)

    assert inner(21) == 42
    assert inner.__name__ == "inner" and inner.__doc__ == "What it does."
    with pytest.raises(nblock.LockUnavailable):
        outer()
    assert nblock.find(key) is None

    with pytest.raises(TypeError, match="generator"):

        @nblock.synchronized(key)
        def generates():
            yield 1


def test_fences_grow(key):
    fences = []
    for _ in range(3):
        with nblock.Lock(key) as lock:
            fences.append(lock.fence)
            assert lock.fence == fences[-1], "one per hold"
    assert fences == sorted(set(fences))
    assert nblock.find(key) is None


def test_reentrant(key):
    lock = nblock.ReentrantLock(key, owner_token="the owner")
    assert lock.owner_token == "the owner"
    with lock, lock:
        assert nblock.find(key).lock_count == 2
        same = nblock.ReentrantLock(key, "the owner")
        assert same.try_lock()
        assert nblock.find(key).lock_count == 3
        same.unlock()
        assert not nblock.ReentrantLock(key).try_lock(), "a random owner is another one"
        assert not nblock.Lock(key).try_lock()
    assert nblock.find(key) is None
    # Any object with the token may unlock.
    lock.lock()
    same.unlock()
    assert nblock.find(key) is None
    with pytest.raises(nblock.LostLock):
        lock.unlock()
    assert len(nblock.ReentrantLock(key).owner_token) > 16


def test_inspection(key):
    before = time.time()
    with nblock.Lock(key, expire=30) as lock:
        record = nblock.find(key)
        assert key in [record.key for record in nblock.locks()]
        assert key not in [record.key for record in nblock.expired()]
        assert record.pid == os.getpid() and record.host and record.boot_id and record.app
        assert record.fence == lock.fence
        assert not record.expired and 0 < record.remaining <= 30
        assert before - 1 < record.acquired_at < time.time() + 1
        assert before + 28 < record.expires_at < time.time() + 31
        assert record.lock_count == 0 and record.foreign is False
        assert key in repr(record) and str(os.getpid()) in repr(record)
    assert nblock.find(key) is None


def test_expired_records_are_listed_broken_and_taken_over(key):
    lock = nblock.Lock(key, expire=0.05)
    lock.lock()
    eventually(lambda: key in [record.key for record in nblock.expired()])
    record = nblock.find(key)
    assert record.expired and record.remaining < 0 and "expired" in repr(record)
    again = nblock.Lock(key)
    assert again.try_lock()
    assert record.break_() is False, "it has changed since it was read"
    record = nblock.find(key)
    assert record.version == nblock.find(key).version
    assert record.break_(if_fence=record.fence + 1) is False
    assert record.break_(if_owner=f"{record.host}:{record.pid + 1}") is False
    assert record.break_(if_version="0" * 16) is False
    for wrong in ("", "host", ":1", "host:", "host:first"):
        with pytest.raises(ValueError, match="if_owner must be HOST:PID"):
            record.break_(if_owner=wrong)
    again.refresh()
    assert nblock.find(key).version != record.version
    record = nblock.find(key)
    seen = {"if_fence": record.fence, "if_owner": f"{record.host}:{record.pid}", "if_version": record.version}
    assert record.break_(**seen) is True
    assert nblock.find(key) is None
    for lost in (again, lock):
        with pytest.raises(nblock.LostLock):
            lost.unlock()


def test_clients(key):
    with nblock.Client("memory:", expire=7, timeout=0.01, app="tester") as client:
        assert client.location and not client.closed
        ping = client.ping()
        assert ping.location == client.location and ping.server
        assert 0 <= ping.round_trip < 60 and ping.skew is None and ping.caveats == []
        lock = client.lock(key)
        lock.lock()
        assert 0 < lock.remaining <= 7
        assert client.find(key).app == "tester"
        assert nblock.find(key) is None, "another store"
        with pytest.raises(nblock.LockUnavailable):
            nblock.Lock(key, client=client).lock()
        reentrant = client.reentrant_lock(key + "r", "me")
        with reentrant:
            assert reentrant.owner_token == "me"
        assert [record.key for record in client.locks()] == [key]
    assert client.closed and "closed" in repr(client)
    client.close()
    with pytest.raises(nblock.LockInvalidOp, match="closed"):
        client.lock(key).lock()


def test_closing_a_client_ends_waits_and_gives_back_what_is_renewed(key):
    client = nblock.Client("memory:" + key)
    watcher = nblock.Client("memory:" + key)
    renewed, plain, waiting = (client.lock(key + name) for name in ("renewed", "plain", "renewed"))
    renewed.acquire()
    plain.lock()
    waiter = Background(waiting.acquire)
    eventually(lambda: waiting.state == "pending")
    client.close()
    with pytest.raises(nblock.LockInvalidOp) as caught:
        waiter.result()
    assert caught.value.status == "NBL_CANCELLED"
    assert [record.key for record in watcher.locks()] == [key + "plain"]
    watcher.close()


def test_configure_is_for_locks_that_were_not_used_yet(key, run):
    program = run(
        """
        import nblock
        lock = nblock.Lock("x")
        nblock.configure("memory:one", expire=7)
        with lock:
            assert 0 < lock.remaining <= 7
            nblock.configure("memory:two")
            assert nblock.Lock("x").try_lock() is True
        for url, expire in (("memory:", 0), ("memory:", "1")):
            try:
                nblock.configure(url, expire)
            except (ValueError, TypeError) as error:
                print(type(error).__name__)
        """
    )
    program.expect("ValueError")
    program.expect("TypeError")
    assert program.end() == (0, "", "")


def test_reprs_help(key):
    lock = nblock.Lock("it's \0 a key", client=nblock.Client("memory:"))
    assert repr(lock) == """<nblock.Lock "it's \\x00 a key" idle>"""
    with lock:
        assert "held, 60.0 s left" in repr(lock)
    assert repr(nblock.ReentrantLock(key)) == f"<nblock.ReentrantLock {key!r} idle>"
    assert repr(nblock.AsyncLock(key)) == f"<nblock.AsyncLock {key!r} idle>"
    assert repr(nblock.Client("memory:")).startswith("<nblock.Client memory ")


def test_subclasses_and_weak_references(key):
    class Mine(nblock.Lock):
        pass

    with Mine(key) as lock:
        assert repr(lock).startswith(f"<nblock.Mine {key!r} held")


def test_errors_have_one_base_and_their_built_in_ones():
    for error, built_in in [
        (nblock.LockUnavailable, TimeoutError),
        (nblock.LostLock, Exception),
        (nblock.LockInvalidOp, RuntimeError),
        (nblock.StoreError, ConnectionError),
        (nblock.ForkedError, Exception),
    ]:
        assert issubclass(error, nblock.Error) and issubclass(error, built_in)
        assert error.__module__ == "nblock"
        raised = error("why")
        raised.status = "NBL_X"
        copy = pickle.loads(pickle.dumps(raised))
        assert (type(copy), str(copy), copy.status) == (error, "why", "NBL_X")


def test_an_error_that_names_a_holder_is_pickled_too(key):
    with nblock.Lock(key), pytest.raises(nblock.LockUnavailable) as caught:
        nblock.Lock(key).lock(timeout=0)
    assert caught.value.holder is not None
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.status, copy.holder) == (str(caught.value), "NBL_UNAVAILABLE", None)


def test_a_store_that_cannot_be_opened(run, tmp_path):
    program = run(
        """
        import os, resource, sys, nblock
        try:
            nblock.Client("nowhere:")
        except ValueError:
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), os.dup(0)))
        try:
            nblock.Client("embedded:" + sys.argv[1])
        except nblock.StoreError as error:
            print(error.status, isinstance(error, ConnectionError), len(str(error)) > 20)
        """,
        str(tmp_path),
    )
    program.expect("NBL_ERR_RESOURCES True True")


def test_a_thread_may_give_back_what_another_took(key):
    lock = nblock.Lock(key)
    lock.acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    assert lock.state == "idle"


def test_a_damaged_record_says_so(key):
    lock = nblock.Lock(key, expire=60)
    lock.acquire()
    assert nblock.find(key).damaged is None
    with damaged(key):
        assert nblock.find(key).damaged
        with pytest.raises(nblock.StoreError, match="damaged"):
            nblock.Lock(key).try_lock()
    assert nblock.find(key).damaged is None
    lock.release()


@contextlib.contextmanager
def damaged(key):
    """Inverts the byte before the key in every copy of its record, and inverts it back at the end."""
    places = [
        (path, found.start() - 1)
        for path in pathlib.Path(os.environ["NBLOCK_DIR"]).rglob("table-*")
        for found in re.finditer(re.escape(key.encode()), path.read_bytes())
    ]
    assert places

    def invert():
        for path, at in places:
            with path.open("r+b") as file:
                file.seek(at)
                (byte,) = file.read(1)
                file.seek(at)
                file.write(bytes([byte ^ 0xFF]))

    invert()
    try:
        yield
    finally:
        invert()
