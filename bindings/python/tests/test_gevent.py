"""gevent: a call that waits lets the other greenlets run."""

import nblock
import pytest

PREAMBLE = """
from gevent import monkey
monkey.patch_all()
import sys, gevent, nblock
key = sys.argv[1]
ticks = 0

def tick():
    global ticks
    while True:
        ticks += 1
        gevent.sleep(0.001)

def ticked():
    "Waits until another greenlet has run a while."
    before = ticks
    while ticks < before + 10:
        gevent.sleep(0.001)

ticker = gevent.spawn(tick)
"""

WAYS = {
    "lock": "nblock.Lock(key).lock(timeout=60)",
    "acquire": "assert nblock.Lock(key).acquire(timeout=60)",
    "with": "with nblock.Lock(key, timeout=60): pass",
}


@pytest.mark.parametrize("how", WAYS)
def test_others_run_while_one_waits(run, key, how):
    # Nothing but another greenlet of this one thread can release it: a wait that holds up the thread never ends.
    program = run(
        PREAMBLE
        + f"""
def wait():
    {WAYS[how]}

held = nblock.Lock(key)
held.lock()
waiter = gevent.spawn(wait)
ticked()
assert not waiter.ready()
held.unlock()
waiter.get()
print("granted")
""",
        key,
    )
    program.expect("granted")
    assert program.end() == (0, "", "")


@pytest.mark.parametrize("ended_by", ["gevent.Timeout(0.01)", "kill"])
def test_what_ends_a_greenlet_ends_its_wait_and_leaves_nothing(run, key, ended_by):
    program = run(
        PREAMBLE
        + f"""
lock = nblock.Lock(key, expire=3600)

def wait():
    try:
        with gevent.Timeout(0.01 if {ended_by!r} != "kill" else None):
            lock.lock(timeout=600)
    except gevent.Timeout:
        print("interrupted", lock.state)
    except gevent.GreenletExit:
        print("interrupted", lock.state)

held = nblock.Lock(key)
held.lock()
waiter = gevent.spawn(wait)
ticked()
waiter.kill() if {ended_by!r} == "kill" else waiter.join()
held.unlock()
# A grant that came to the one that has gone would last an hour.
with nblock.Lock(key, timeout=30):
    print("free")
""",
        key,
    )
    program.expect("interrupted idle")
    program.expect("free")
    assert program.end() == (0, "", "")


@pytest.mark.parametrize("imported_first", ["gevent", "nblock"])
def test_a_loss_is_told_in_a_greenlet(run, key, imported_first):
    program = run(
        ("import nblock" if imported_first == "nblock" else "")
        + PREAMBLE
        + """
import gevent.event
notified = gevent.event.Event()
lock = nblock.Lock(key, expire=0.05, on_lost=lambda lock: notified.set())
lock.lock()
assert notified.wait(30)
notified.clear()
lock.refresh(expire=0.05)
assert notified.wait(30)
lock.unlock()
print("notified")
""",
        key,
    )
    program.expect("notified")
    assert program.end() == (0, "", "")


def test_another_greenlet_is_not_this_very_thread(run, key):
    program = run(
        PREAMBLE
        + """
def refused():
    try:
        nblock.Lock(key).lock(timeout=0)
    except nblock.LockUnavailable as error:
        return str(error)

with nblock.Lock(key):
    print("this thread" in refused(), "this process" in gevent.spawn(refused).get())
""",
        key,
    )
    program.expect("True True")
    assert program.end() == (0, "", "")


def test_what_is_only_imported_changes_nothing(run, key):
    program = run(
        """
        import sys, gevent, gevent.monkey, nblock
        try:
            nblock.Lock(sys.argv[1]).lock(timeout=0.01)
        except nblock.LockUnavailable:
            print("refused")
        """,
        key,
    )
    with nblock.Lock(key):
        program.expect("refused")
    assert program.end() == (0, "", "")
