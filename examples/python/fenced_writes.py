"""A resource that takes nothing from who was overtaken: it checks the fence."""

import nblock


class Ledger:
    """Stands for a database, a file server, or whatever the lock protects."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.highest_fence = 0

    def append(self, line: str, fence: int) -> None:
        if fence < self.highest_fence:
            raise PermissionError(f"fence {fence} comes after {self.highest_fence}: its hold was over")
        self.highest_fence = fence
        self.lines.append(line)


def main() -> None:
    ledger = Ledger()
    # A program that is paused for longer than its lease, and another one that takes over meanwhile.
    paused = nblock.Lock("examples:ledger", expire=0.05, fence=True)
    paused.lock()
    fence_of_paused = paused.fence
    with nblock.Lock("examples:ledger", fence=True) as lock:
        ledger.append("from who took over", lock.fence)
    try:
        ledger.append("from who was paused", fence_of_paused)
    except PermissionError as error:
        print(error)
    try:
        paused.unlock()
    except nblock.LostLock as error:
        print(error)
    assert ledger.lines == ["from who took over"]


if __name__ == "__main__":
    main()
