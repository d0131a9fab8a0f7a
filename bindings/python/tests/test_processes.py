"""Processes: a hold is its process's, whatever the processes are made with (R16)."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ProcessPoolExecutor

import nblock
import pytest
from conftest import SOON, eventually

#: As a program's modules have it: made at import, before anything forks.
LOCK = nblock.Lock("test_processes:module")


@nblock.synchronized("test_processes:decorated")
def add_one(path):
    """Reads, adds and writes: wrong if two do it at once."""
    with open(path) as file:
        value = int(file.read())
    with open(path, "w") as file:
        file.write(str(value + 1))


def work(path, rounds):
    for _ in range(rounds):
        with LOCK:
            with open(path) as file:
                value = int(file.read())
            with open(path, "w") as file:
                file.write(str(value + 1))
        add_one(path + ".decorated")
    return os.getpid()


@pytest.fixture
def counters(tmp_path):
    for name in ("n", "n.decorated"):
        (tmp_path / name).write_text("0")
    return tmp_path / "n"


METHODS = ["fork", "forkserver", "spawn"]


# A library's threads are there while these tests fork, which newer Pythons warn of.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing(counters, method):
    with LOCK:
        pass
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=work, args=(str(counters), 25)) for _ in range(3)]
    for process in processes:
        process.start()
    work(str(counters), 25)
    for process in processes:
        process.join(SOON)
        assert process.exitcode == 0
    assert counters.read_text() == "100"
    assert counters.with_name("n.decorated").read_text() == "100"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_process_pool(counters, method):
    with LOCK:
        pass
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        pids = set(pool.map(work, [str(counters)] * 10, [5] * 10))
    assert os.getpid() not in pids
    assert counters.read_text() == "50"


def test_a_forked_child_has_its_own_holds(run, key):
    program = run(
        """
        import os, sys, threading, nblock
        key = sys.argv[1]
        held, idle = nblock.Lock(key, expire=60), nblock.Lock(key + "idle")
        renewed = nblock.Lock(key + "renewed")
        held.lock()
        renewed.acquire()
        with idle:
            pass

        # Threads of the parent's wait, lock and unlock while it forks.
        stop = False
        def busy():
            lock = nblock.Lock(key + "busy")
            while not stop:
                with lock:
                    pass
        threads = [threading.Thread(target=busy) for _ in range(2)]
        waiting = threading.Thread(target=nblock.Lock(key, timeout=1e6).acquire, daemon=True)
        for thread in [*threads, waiting]:
            thread.start()

        def child():
            assert held.state == renewed.state == "forked", (held.state, renewed.state)
            assert not held.held and not held.lost and held.remaining == 0.0
            for call in (held.unlock, renewed.refresh):
                try:
                    call()
                except nblock.ForkedError:
                    pass
                else:
                    raise AssertionError("not notified")
            for lock in (held, renewed):
                assert lock.state == "idle"
                assert not lock.try_lock(), "it is the parent's"
            with idle, nblock.Lock(key + "busy"):
                assert nblock.find(key + "idle").pid == os.getpid()
            with nblock.ReentrantLock(key + "reentrant") as reentrant, reentrant:
                pass

        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child()
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
            assert held.held and renewed.held
        stop = True
        for thread in threads:
            thread.join()
        held.unlock()
        waiting.join()
        renewed.release()
        print("done")
        """,
        key,
    )
    program.expect("done")
    assert program.end()[0] == 0
    assert nblock.find(key + "renewed") is None and nblock.find(key + "idle") is None


def test_a_block_that_is_left_in_a_child_tells(run, key):
    program = run(
        """
        import os, sys, nblock
        try:
            with nblock.Lock(sys.argv[1]):
                pid = os.fork()
        except nblock.ForkedError as error:
            os._exit(42 if error.status == "NBL_ERR_FORKED" else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
        key,
    )
    program.expect("42")
    assert program.end() == (0, "", "")


def test_a_child_that_exits_gives_back_nothing_of_the_parents(run, key):
    program = run(
        """
        import os, sys, nblock
        lock = nblock.Lock(sys.argv[1])
        lock.acquire()
        pid = os.fork()
        if pid == 0:
            with nblock.Lock(sys.argv[1] + "child"):
                sys.exit(0)
        print(os.waitpid(pid, 0)[1], lock.held)
        lock.release()
        """,
        key,
    )
    program.expect("0 True")
    assert program.end() == (0, "", "")


def test_exit_closes_the_default_client(run, key):
    program = run(
        """
        import sys, nblock
        key = sys.argv[1]
        renewed, plain = nblock.Lock(key + "renewed"), nblock.Lock(key + "plain")
        renewed.acquire()
        plain.lock()
        print("held")
        """,
        key,
    )
    program.expect("held")
    assert program.end() == (0, "", ""), "nothing is said, not even a ResourceWarning"
    assert nblock.find(key + "renewed") is None
    assert nblock.find(key + "plain") is not None, "a plain lease runs out: once a day stays once a day"


APPLICATION = """
import os
import nblock

lock = nblock.Lock("gunicorn:" + os.environ["KEY"])
# The parent has used it, and its store is open.
with lock:
    pass

@nblock.synchronized("gunicorn:decorated:" + os.environ["KEY"])
def count(path):
    with open(path) as file:
        value = int(file.read())
    with open(path, "w") as file:
        file.write(str(value + 1))

def application(environ, start_response):
    with lock:
        count(os.environ["COUNTER"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


def test_gunicorn_with_preload(tmp_path, key):
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "counter").write_text("0")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "3", "--bind", f"127.0.0.1:{port}"]
    # Newer ones can be controlled through a socket, which this test has no use for.
    said = subprocess.run([sys.executable, "-m", "gunicorn", "--help"], capture_output=True, text=True).stdout
    if "--no-control-socket" in said:
        command.append("--no-control-socket")
    environment = {**os.environ, "KEY": key, "COUNTER": str(tmp_path / "counter")}
    with open(tmp_path / "log", "w") as log:
        master = subprocess.Popen([*command, "app:application"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:

        def ask():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SOON) as response:
                return response.read()

        def answers():
            assert master.poll() is None, (tmp_path / "log").read_text()
            try:
                return bool(ask())
            except OSError:
                return False

        eventually(answers)
        started = int((tmp_path / "counter").read_text())
        with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
            workers = set(pool.map(_get, [f"http://127.0.0.1:{port}/"] * 120))
        assert int((tmp_path / "counter").read_text()) == started + 120
        assert len(workers) > 1, "more than one worker was at it"
        assert str(master.pid).encode() not in workers
    finally:
        master.send_signal(signal.SIGTERM)
        master.wait(SOON)


def _get(url):
    with urllib.request.urlopen(url, timeout=SOON) as response:
        return response.read()
