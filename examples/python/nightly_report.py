"""A job that many machines' cron may start, and that runs once at a time."""

import sys

import nblock


def report() -> None:
    print("reporting")


def main() -> int:
    try:
        # Renewed while the block runs, however long that is. Who cannot have it at once goes home.
        with nblock.Lock("examples:nightly-report", timeout=0):
            report()
    except nblock.LockUnavailable:
        holder = nblock.find("examples:nightly-report")
        print(f"it runs already: {holder}")
    except nblock.LostLock:
        print("the lock was lost on the way: another one may have run beside this", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
