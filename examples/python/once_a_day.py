"""Does something once a day: the lease of a day keeps the other programs away, also after this one has ended.

With the embedded store, a reboot ends the lease, and it may be done twice that day. A network store keeps it.
"""

import nblock

DAY = 24 * 60 * 60


def main() -> None:
    # Closing releases what is renewed, and lets plain leases like this one run out.
    with nblock.Client(app="once a day") as client:
        if client.lock("examples:once-a-day").try_lock(expire=DAY):
            print("done")
        else:
            print("already done today")


if __name__ == "__main__":
    main()
