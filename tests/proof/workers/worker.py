"""A worker of the history test, in Python: what worker.c does.

python3 worker.py URL KEY DIRECTORY WHO SEED EXPIRE_MS
"""

import itertools
import os
import random
import sys
import threading
import time
import traceback

import nblock

url, key, directory, who, seed, expire_ms = sys.argv[1:]
expire = int(expire_ms) / 1000
counter = os.open(f"{directory}/counter", os.O_RDWR)
log = os.open(f"{directory}/log", os.O_WRONLY | os.O_APPEND)


def moment():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def note(*words):
    """A line in one write: lines of several processes do not mix."""
    os.write(log, f"\n{' '.join(map(str, words))} .\n".encode())


def deadline_of(lock):
    """Counted from before it was asked for: never too late. 1 where it has passed."""
    now, remaining_ms = moment(), int(lock.remaining * 1000)
    return now + remaining_ms * 1_000_000 if remaining_ms else 1


def check(error):
    """No answer is no grant; everything else is a defect."""
    if error.status not in ("NBL_ERR_UNREACHABLE", "NBL_ERR_INDETERMINATE"):
        raise error


def connected():
    while True:
        try:
            return nblock.Client(url)
        except nblock.StoreError as error:
            # A connection that is cut while it is greeted reads like a wrong URL.
            if error.status != "NBL_ERR_STORE":
                check(error)
            time.sleep(0.02)


def use(lock, name, deadline, renewed, chance):
    number = int(os.pread(counter, 20, 0))
    if chance.random() < 0.01:
        # Long enough for its lease to run out now and then.
        time.sleep(expire * chance.random() * 1.7)
        if renewed and (later := deadline_of(lock)) > deadline:
            deadline = later
            note("renewed", *name, deadline)
    now = moment()
    if now < deadline:
        note("writing", *name, number, now)
        os.pwrite(counter, f"{number + 1:19}\n".encode(), 0)
        note("wrote", *name, moment())


def work(who, seed):
    chance = random.Random(seed)
    client = connected()
    for turn in itertools.count(1):
        name = who, turn
        timeout, renewed = chance.choice([0.005, 0.2, 30]), chance.random() < 0.25
        lock = nblock.Lock(key, expire=expire, timeout=timeout, auto_refresh=renewed, fence=True, client=client)
        fence = deadline = 0
        asked = moment()
        try:
            lock.lock()
            fence, deadline = lock.fence, deadline_of(lock)
        except nblock.LockUnavailable:
            pass
        except nblock.LostLock:
            continue
        except nblock.StoreError as error:
            check(error)
            continue
        now = moment()
        if 0 < deadline <= now:
            deadline = -1  # Over before it began: it is not relied on.
        else:
            note("waited", *name, asked, int(timeout * 1000) * 1_000_000, now)
        if deadline == 0:
            continue
        if deadline > 0:
            note("granted", *name, fence, now, deadline)
            use(lock, name, deadline, renewed, chance)
            note("released", *name, moment())
        try:
            lock.unlock()
        except nblock.LostLock:
            if deadline > 0:
                note("lost", *name, moment())
        except nblock.StoreError as error:
            check(error)


def thread(*arguments):
    try:
        work(*arguments)
    finally:
        traceback.print_exc()
        os._exit(1)


threads = [threading.Thread(target=thread, args=(int(who) + i, int(seed) * 2 + i)) for i in range(2)]
for each in threads:
    each.start()
