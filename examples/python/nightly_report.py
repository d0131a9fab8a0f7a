"""A job that cron may start on several machines, and of which one runs at a time.

NBLOCK_URL must name a store that all machines reach. Without it, each machine runs its own.
"""

import sys

import nblock


def report() -> None:
    print("reporting")


def main() -> int:
    try:
        # Renewed while the block runs, however long that is. A process that does not get the lock at once gives up.
        with nblock.Lock("examples:nightly-report", timeout=0):
            report()
    except nblock.LockUnavailable as error:
        print(f"it runs already: {error}")
    except nblock.LostLock:
        print("the lock was lost meanwhile: another process may have run at the same time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
