"""What an error says about the holder of a lock that was not granted."""

import asyncio
import os
import subprocess
import sys
import threading

import nblock
import pytest
from conftest import Background


def refused(make):
    with pytest.raises(nblock.LockUnavailable) as caught:
        make()
    return caught.value


def enter(lock):
    with lock:
        pytest.fail("granted")


FORMS = {
    "lock": lambda key: nblock.Lock(key).lock(timeout=0),
    "with": lambda key: enter(nblock.Lock(key, timeout=0)),
    "synchronize": lambda key: enter(nblock.Lock(key).synchronize(timeout=0.01)),
    "synchronized": lambda key: nblock.synchronized(key, timeout=0)(lambda: pytest.fail("granted"))(),
    "reentrant": lambda key: nblock.ReentrantLock(key, "another owner").lock(timeout=0),
    "asyncio": lambda key: asyncio.run(nblock.AsyncLock(key).lock(timeout=0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_process_is_named(key, holder, form):
    program = holder(key)
    error = refused(lambda: FORMS[form](key))
    assert f"held by {os.uname().nodename}:{program.process.pid} " in str(error)
    assert " s left" in str(error) and key.split(":")[0] in str(error)
    # It is no relation of ours that would wait for us.
    assert "(" not in str(error).partition(" held by ")[2]
    assert error.holder.pid == program.process.pid and error.status == "NBL_UNAVAILABLE"


@pytest.mark.parametrize("form", FORMS)
def test_the_thread_itself_is_named(key, form):
    with nblock.Lock(key):
        assert "(this thread)" in str(refused(lambda: FORMS[form](key)))


def test_another_thread_of_the_process_is_named(key):
    taken, release = threading.Event(), threading.Event()

    def hold():
        with nblock.Lock(key):
            taken.set()
            release.wait()

    other = Background(hold)
    assert taken.wait(30)
    assert "(this process)" in str(refused(lambda: nblock.Lock(key).lock(timeout=0)))
    release.set()
    other.result()


TRIES = """
import sys, nblock
try:
    nblock.Lock(sys.argv[1]).lock(timeout=0)
except nblock.LockUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize("runs_under_it", [False, True])
def test_a_parent_is_named(key, runs_under_it):
    environment = {**os.environ, "NBLOCK_KEY": key if runs_under_it else "another key"}
    with nblock.Lock(key):
        child = [sys.executable, "-c", TRIES, key]
        # From a child, and from a child's child.
        for command in [child, ["sh", "-c", '"$@"; true', "-", *child]]:
            said = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert ("NBLOCK_KEY" if runs_under_it else "(a parent of this process)") in said.stdout, said


def test_a_forked_child_is_told_of_its_parent(key):
    lock = nblock.Lock(key)
    reader, writer = os.pipe()
    with lock:
        child = os.fork()
        if child == 0:
            os.write(writer, str(refused(lambda: nblock.Lock(key).lock(timeout=0))).encode())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert b"(a parent of this process)" in os.read(reader, 4096)


def test_nobody_is_named_where_the_holder_went_meanwhile(key):
    # What was released between the last try and the look is not held by anybody.
    lock = nblock.Lock(key, timeout=0)
    with nblock.Lock(key):
        assert refused(lock.lock).holder is not None
    error = lock._unavailable(lock._start_find())
    assert isinstance(error, nblock.LockUnavailable) and error.holder is None and "held by" not in str(error)


def test_a_long_key_is_cut():
    key = "long " * 1000
    lock = nblock.Lock(key, timeout=0)
    with nblock.Lock(key):
        message = str(refused(lock.lock))
        record = repr(nblock.find(key))
    for shown in (message, record, repr(lock), repr(nblock.AsyncLock(key))):
        assert "long long..." in shown.replace("'", "") or "long ..." in shown.replace("'", "")
        assert len(shown) < 300
