"""Interrupting a wait: at once, and nothing is left behind."""

import os
import signal

import nblock
import pytest
from conftest import Background, eventually

#: A program whose main thread waits for a held key, in one of the ways to wait.
WAITS = """
import signal, sys, time, nblock
key, how = sys.argv[1:]

class Stop(Exception):
    pass

def stop(number, frame):
    raise Stop

signal.signal(signal.SIGUSR1, stop)
seen = []
signal.signal(signal.SIGUSR2, lambda number, frame: (seen.append(number), print("seen")))
lock = nblock.Lock(key, timeout=1e6)

def enter():
    with lock:
        pass

ways = {
    "lock": lock.lock,
    "acquire": lock.acquire,
    "with": enter,
    "synchronize": lambda: lock.synchronize(timeout=1e6).__enter__(),
}
print("waiting")
try:
    ways[how]()
except (KeyboardInterrupt, Stop) as error:
    print(type(error).__name__, lock.state)
else:
    print("granted", lock.state)
    if lock.held:
        lock.unlock()
sys.stdin.readline()
"""


def waiting(run, key, how="lock"):
    program = run(WAITS, key, how)
    program.expect("waiting")
    # The signal comes while it sleeps, as far as that can be seen from outside.
    state = f"/proc/{program.process.pid}/task/{program.process.pid}/syscall"
    eventually(lambda: open(state).read().split()[0] == str(FUTEX))
    return program


#: The number of the system call that a waiting thread is in.
FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine)


@pytest.fixture(autouse=True)
def known_machine():
    assert FUTEX is not None, "which number futex has on this machine is to be added above"


@pytest.mark.parametrize("how", ["lock", "acquire", "with", "synchronize"])
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGUSR1, "Stop")])
def test_a_signal_ends_the_wait_and_leaves_nothing(run, key, how, number, raised):
    with nblock.Lock(key):
        program = waiting(run, key, how)
        program.process.send_signal(number)
        program.expect(f"{raised} idle")
    # A waiter that gave up is not granted: the key stays free while that program lives.
    assert nblock.find(key) is None
    with nblock.Lock(key, timeout=0):
        pass
    program.tell()
    assert program.end() == (0, "", "")


def test_a_handler_that_raises_nothing_runs_and_the_wait_goes_on(run, key):
    lock = nblock.Lock(key)
    lock.acquire()
    program = waiting(run, key)
    for _ in range(3):
        program.process.send_signal(signal.SIGUSR2)
        program.expect("seen")
    lock.release()
    program.expect("granted held")


def test_an_interrupt_is_answered_within_a_tenth_of_a_second(run, key):
    """The handler notes when it runs and when the wait has ended: what lies between is ours."""
    with nblock.Lock(key):
        program = run(
            """
            import os, signal, sys, threading, time, nblock
            worst = []
            sent = 0.0
            def ring():
                global sent
                sent = time.monotonic()
                # To the whole process: the system picks the thread.
                os.kill(os.getpid(), signal.SIGINT)
            # Threads that could be picked instead of the main one.
            for _ in range(4):
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            for _ in range(7):
                threading.Timer(0.12, ring).start()
                try:
                    nblock.Lock(sys.argv[1], timeout=1e6).lock()
                except KeyboardInterrupt:
                    worst.append(time.monotonic() - sent)
            # A loaded machine may be late now and then: the one in the middle tells.
            print("ok" if sorted(worst)[3] < 0.1 else worst)
            """,
            key,
        )
        program.expect("ok")


def test_an_interrupted_grant_is_given_back(run, key):
    """Interrupts that come as the grant does: a hold is either known to the program, or it is not there."""
    program = run(
        """
        import signal, sys, nblock
        key = sys.argv[1]
        lock = nblock.Lock(key, timeout=1e6)
        class Stop(Exception):
            pass
        armed = False
        def stop(number, frame):
            if armed:
                raise Stop
        signal.signal(signal.SIGUSR1, stop)
        print("ready")
        for line in sys.stdin:
            try:
                armed = True
                lock.acquire()
            except Stop:
                pass
            armed = False
            state = lock.state
            if state == "held":
                lock.unlock()
            print(state)
        """,
        key,
    )
    program.expect("ready")
    for _ in range(60):
        ours = nblock.Lock(key)
        ours.lock()
        program.tell()
        sender = Background(os.kill, program.process.pid, signal.SIGUSR1)
        ours.unlock()
        sender.result()
        line = program.line()
        assert line in ("held", "idle"), program.end()
        eventually(lambda: nblock.find(key) is None)


def test_waits_of_other_threads_end_with_the_program(run, key):
    with nblock.Lock(key):
        program = run(
            """
            import sys, threading, nblock
            lock = nblock.Lock(sys.argv[1])
            thread = threading.Thread(target=lock.acquire, daemon=True)
            thread.start()
            while lock.state != "pending":
                pass
            print("bye")
            """,
            key,
        )
        program.expect("bye")
        # Its thread may still say that the client was closed, or not get to it.
        assert program.end()[0] == 0
    assert nblock.find(key) is None
