"""redis-py's Lock, controlled by lines on standard input: acquire KEY SECONDS, release KEY."""

import sys

import redis
from redis.exceptions import LockError

client = redis.Redis(port=int(sys.argv[1]))
locks = {}
for line in sys.stdin:
    verb, key, *rest = line.split()
    done = True
    if verb == "acquire":
        locks[key] = client.lock(key, timeout=float(rest[0]))
        done = locks[key].acquire(blocking=False)
    else:
        try:
            locks[key].release()
        except LockError:
            done = False
    print("@", "yes" if done else "no", flush=True)
