"""Of several processes or tasks, the one that holds the lock leads, and stops as soon as it knows of a loss."""

from __future__ import annotations

import asyncio
import math

import nblock


async def lead(name: str, rounds: int) -> None:
    for number in range(rounds):
        print(f"{name} leads, round {number}")
        await asyncio.sleep(0.01)


async def candidate(name: str) -> None:
    # The block is cancelled as soon as the hold is overdue or lost. Two lead at once only if the process was paused, or
    # the lock was broken: where that would cause damage, check the fence.
    try:
        async with nblock.AsyncLock("examples:leader", timeout=math.inf, cancel_on_lost=True) as lock:
            print(f"{name} was elected, with fence {lock.fence}")
            await lead(name, rounds=3)
    except nblock.LostLock:
        print(f"{name} has lost the lead")


async def main() -> None:
    await asyncio.gather(*(candidate(name) for name in ("anna", "ben", "carla")))


if __name__ == "__main__":
    asyncio.run(main())
