"""Locks on Redis, where the values of other programs stand under the same keys."""

import asyncio
import math
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import nblock
import pytest

SERVERS = Path(__file__).parents[3] / "tools" / "servers.sh"


class Server:
    """A Redis server, which ends with the tests. Its values are set as any other program sets them."""

    def __init__(self, directory):
        self.tool = subprocess.Popen(
            [SERVERS, "run", "redis", directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = {}
        # It prints the process id last.
        while "pid" not in self.facts:
            name, _, value = self.tool.stdout.readline().rstrip("\n").partition("=")
            assert name, "the server did not start: see what servers.sh printed"
            self.facts[name] = value

    @property
    def url(self):
        return self.facts["url"]

    def command(self, text):
        with socket.create_connection(("127.0.0.1", int(self.facts["port"]))) as connection:
            connection.sendall(text.encode() + b"\r\n")
            return connection.makefile().readline().rstrip("\r\n")

    def end(self):
        self.tool.communicate()


@pytest.fixture(scope="module")
def server():
    directory = tempfile.mkdtemp(prefix="nblock-redis-")
    running = Server(directory)
    yield running
    running.end()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def client(server):
    with nblock.Client(server.url) as client:
        yield client


def test_a_value_without_an_end_is_a_lock_without_an_end(server, client):
    assert server.command("SET another:forever value") == "+OK"
    lock = client.lock("another:forever")
    assert not lock.try_lock()
    record = client.find("another:forever")
    assert record.foreign and not record.expired and record.host is None
    assert record.remaining == math.inf and record.expires_at == math.inf
    assert repr(record) == "<nblock.Record 'another:forever' (foreign), with no end>"
    with pytest.raises(nblock.LockUnavailable, match="held by somebody else, with no end"):
        lock.lock(timeout=0)
    assert record.break_() is False, "another program's data"
    assert server.command("DEL another:forever") == ":1"
    with lock:
        assert not client.find("another:forever").foreign


def test_a_value_with_an_end_is_a_lock_until_then(server, client):
    assert server.command("SET another:soon value PX 300") == "+OK"
    with client.lock("another:soon", timeout=30):
        assert not client.find("another:soon").foreign
    assert client.find("another:soon") is None


def test_a_task_that_is_cancelled_as_the_lock_is_granted_can_lock_again(server):
    async def main():
        client = await nblock.connect(server.url)
        lock = nblock.AsyncLock("cancelled:task", client=client)
        cancelled = 0
        for _ in range(1000):
            task = asyncio.create_task(lock.lock())
            await asyncio.sleep(0)
            # The loop stands still meanwhile: unless the task has its grant already, it is cancelled before it gets it.
            while server.command("EXISTS cancelled:task") != ":1":
                pass
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                await lock.lock()
                cancelled += 1
            await lock.unlock()
            if cancelled == 20:
                break
        assert cancelled == 20
        client.close()

    asyncio.run(main())
