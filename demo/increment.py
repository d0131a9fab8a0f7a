# What increment.c does, in Python: python3 demo/increment.py NAME COUNT COUNTER LOG
import sys
import time

import nblock

name, count, counter, log = sys.argv[1:]
lock = nblock.Lock("jobs:demo", expire=1, timeout=60)
for _ in range(int(count)):
    with lock:
        with open(counter, "r+") as file:
            number = int(file.read()) + 1
            file.seek(0)
            file.write(f"{number:019}\n")
        with open(log, "a") as file:
            file.write(f"{number} {name} {lock.fence}\n")
    time.sleep(0.0003)
