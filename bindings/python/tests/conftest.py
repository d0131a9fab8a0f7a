"""What the tests share: a store of their own, keys of their own, and programs to run beside them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading

import pytest

# Before anything opens the default client, and for every process that the tests start; some of those import
# this file again.
_mine = "NBLOCK_TESTS" not in os.environ
_directory = os.environ.get("NBLOCK_TESTS") or tempfile.mkdtemp(prefix="nblock-python-")
os.environ["NBLOCK_TESTS"] = os.environ["NBLOCK_DIR"] = _directory
for _name in ("NBLOCK_URL", "RETHINKDB_URL", "RETHINKDB_HOST", "RDB_URL", "RDB_HOST"):
    os.environ.pop(_name, None)

# A shell that runs the tests in the background has interrupts ignored, and whatever they start would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Long enough for anything that is to happen at once, on a machine that has much else to do.
SOON = 30


def pytest_unconfigure():
    if _mine:
        shutil.rmtree(_directory, ignore_errors=True)


@pytest.fixture
def key(request):
    """A key that no other test uses."""
    return f"test:{request.node.nodeid}"


class Program:
    """A Python program that runs beside the test; both exchange lines."""

    def __init__(self, source, *arguments):
        self.process = subprocess.Popen(
            # Newer Pythons warn of every fork while a thread runs, be it a library's.
            [sys.executable, "-u", "-W", "ignore:This process", "-c", textwrap.dedent(source), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # The tests are about what is installed, not about what lies beside them.
            cwd=_directory,
        )

    def expect(self, line):
        """Reads a line and compares it."""
        got = self.process.stdout.readline().rstrip("\n")
        if got != line:
            self.process.kill()
            rest, errors = self.process.communicate()
            raise AssertionError(f"expected {line!r}, got {got!r} and then:\n{rest}\n{errors}")

    def line(self):
        return self.process.stdout.readline().rstrip("\n")

    def tell(self, line=""):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self):
        """Waits for its end: its status, and what it still wrote to both."""
        output, errors = self.process.communicate(timeout=SOON)
        return self.process.returncode, output, errors

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def run():
    """Starts programs, and ends them with the test."""
    programs = []

    def start(source, *arguments):
        programs.append(Program(source, *arguments))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.kill()


@pytest.fixture
def holder(run):
    """Has another process hold a key: sent a line, it unlocks and ends."""

    def hold(key, expire=60):
        program = run(
            """
            import sys, nblock
            lock = nblock.Lock(sys.argv[1], expire=float(sys.argv[2]))
            with lock:
                print("held")
                sys.stdin.readline()
            """,
            key,
            str(expire),
        )
        program.expect("held")
        return program

    return hold


class Background(threading.Thread):
    """A thread whose outcome ``result`` returns."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self.function, self.arguments = function, arguments
        self.outcome = self.error = None
        self.start()

    def run(self):
        try:
            self.outcome = self.function(*self.arguments)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(SOON)
        assert not self.is_alive(), "the thread is still at it"
        if self.error is not None:
            raise self.error
        return self.outcome


def eventually(condition):
    """Waits until something is so; fails when it does not become so for a long while."""
    import time

    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
