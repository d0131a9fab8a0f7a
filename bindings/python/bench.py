"""What an uncontended `with lock:` costs, beside what others do for the same on one machine."""

import os
import random
import statistics
import tempfile
import threading
import time

import fasteners
import filelock
import nblock
import redis

#: Each is measured so often, in turns, so that what else the machine does falls on all of them.
ROUNDS = 7
#: For about so many seconds each time.
LENGTH = 0.15


def cycles(lock, count):
    """Takes and gives back count times; answers microseconds per time."""
    start = time.perf_counter()
    for _ in range(count):
        with lock:
            pass
    return (time.perf_counter() - start) / count * 1e6


def hand_over(holder, waiter):
    """Milliseconds from one lock's release to the grant of another that waits in a thread."""
    granted = []

    def wait():
        waiter.acquire()
        granted.append(time.perf_counter())
        waiter.release()

    holder.acquire()
    thread = threading.Thread(target=wait)
    thread.start()
    # Longer than it takes to begin to wait, and not in step with a library that polls.
    time.sleep(random.uniform(0.05, 0.15))
    released = time.perf_counter()
    holder.release()
    thread.join()
    return (granted[0] - released) * 1e3


def on_redis(port):
    """Beside redis-py's own Lock, on one server."""
    client = redis.Redis(port=port)
    # Another option, another connection: as in two processes.
    ours = [nblock.Client(f"redis://127.0.0.1:{port}?skew={skew}") for skew in (0, 1)]
    locks = {
        "nblock": [nblock.Lock("bench-nblock", client=ours[n]) for n in (0, 1)],
        "redis-py Lock": [redis.lock.Lock(client, "bench-redis-py", timeout=60) for _ in (0, 1)],
    }
    times = {name: [] for name in locks}
    waits = {name: [] for name in locks}
    for _ in range(ROUNDS):
        for name, (one, other) in locks.items():
            times[name].append(cycles(one, 200))
            waits[name].extend(hand_over(one, other) for _ in range(5))
    print(f"with lock: on Redis, uncontended, median of {ROUNDS} rounds; and from a release to the next grant")
    for name in locks:
        print(f"  {name:14} {statistics.median(times[name]):8.2f} µs   {statistics.median(waits[name]):8.2f} ms")
    cycle = statistics.median(times["redis-py Lock"]) / statistics.median(times["nblock"])
    wait = statistics.median(waits["redis-py Lock"]) / statistics.median(waits["nblock"])
    print(f"  redis-py's {cycle:.2f} × ours, to reach 1 ×; its waiting {wait:.0f} × ours, to reach 100 ×")


def main():
    with tempfile.TemporaryDirectory() as directory:
        # The server that bench.sh started.
        client = redis.Redis(port=int(os.environ["NBLOCK_REDIS_PORT"]))
        locks = {
            "nblock": nblock.Lock("bench"),
            "filelock": filelock.FileLock(os.path.join(directory, "filelock")),
            "fasteners": fasteners.InterProcessLock(os.path.join(directory, "fasteners")),
            "redis-py Lock": redis.lock.Lock(client, "bench", timeout=60),
        }
        counts = {}
        for name, lock in locks.items():
            cycles(lock, 50)
            counts[name] = max(50, int(LENGTH * 1e6 / cycles(lock, 50)))
        times = {name: [] for name in locks}
        for _ in range(ROUNDS):
            for name, lock in locks.items():
                times[name].append(cycles(lock, counts[name]))

    ours = statistics.median(times["nblock"])
    wanted = {"filelock": 20, "fasteners": 5, "redis-py Lock": 60}
    print(f"with lock: on the embedded store, uncontended, median of {ROUNDS} rounds")
    for name, measured in times.items():
        theirs = statistics.median(measured)
        line = f"  {name:14} {theirs:8.2f} µs  (fastest {min(measured):.2f}, slowest {max(measured):.2f})"
        if name in wanted:
            line += f"   {theirs / ours:6.1f} × ours, to reach {wanted[name]} ×"
        print(line)
    on_redis(int(os.environ["NBLOCK_REDIS_PORT"]))


if __name__ == "__main__":
    main()
