"""A leader among several processes: it leads while it holds the lock, and stops at once when it does not."""

from __future__ import annotations

import asyncio
import math

import nblock


async def lead(name: str, rounds: int) -> None:
    for number in range(rounds):
        print(f"{name} leads, round {number}")
        await asyncio.sleep(0.01)


async def candidate(name: str) -> None:
    # The block is cancelled when the hold is not certainly ours any more: two never lead.
    try:
        async with nblock.AsyncLock("examples:leader", timeout=math.inf, cancel_on_lost=True) as lock:
            print(f"{name} was elected, with fence {lock.fence}")
            await lead(name, rounds=3)
    except nblock.LostLock:
        print(f"{name} leads no more")


async def main() -> None:
    await asyncio.gather(*(candidate(name) for name in ("anna", "ben", "carla")))


if __name__ == "__main__":
    asyncio.run(main())
