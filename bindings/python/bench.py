"""What an uncontended `with lock:` costs, beside what others do for the same on one machine."""

import os
import statistics
import tempfile
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


if __name__ == "__main__":
    main()
