"""A resource that refuses writes of a holder whose lease has ended: it checks the fence."""

import nblock


class Ledger:
    """The resource that the lock protects, such as a database or a file server."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.highest_fence = 0

    def append(self, line: str, fence: int) -> None:
        if fence < self.highest_fence:
            raise PermissionError(f"fence {fence} is smaller than {self.highest_fence}: its hold has ended")
        self.highest_fence = fence
        self.lines.append(line)


def main() -> None:
    ledger = Ledger()
    # One program is paused for longer than its lease; another one takes the lock over meanwhile.
    paused = nblock.Lock("examples:ledger", expire=0.05, fence=True)
    paused.lock()
    fence_of_paused = paused.fence
    with nblock.Lock("examples:ledger", fence=True) as lock:
        ledger.append("by the new holder", lock.fence)
    try:
        ledger.append("by the paused holder", fence_of_paused)
    except PermissionError as error:
        print(error)
    try:
        paused.unlock()
    except nblock.LostLock as error:
        print(error)
    assert ledger.lines == ["by the new holder"]


if __name__ == "__main__":
    main()
