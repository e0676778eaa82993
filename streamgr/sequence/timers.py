"""Whose labels close at which step of the watermark.

The timers lie in the store's `due` family, in the order in which they fall due; in memory are only those that are not
written yet. So a partition opens at once however many labels are open, and memory does not grow with them. What is
asked for and falls due between two writes is never stored.
"""

import heapq

from streamgr.state import codec
from streamgr.state.rocks import Batch
from streamgr.state.store import Store

Due = tuple[bytes, int | None]  # a user's key; the time of the oldest event that the watermark had passed when it came


class Timers:
    """The timers of one partition. Times and steps in event ms."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fresh: dict[int, set[Due]] = {}  # not written yet, by step
        self._steps: list[int] = []  # those steps, a heap
        self._closed: list[bytes] = []  # stored keys that have fallen due since the last write
        self._quiet_until = -1  # no stored timer lies in the steps before this one

    def schedule(self, step: int, user: bytes, behind: int | None = None) -> None:
        """Look at the user when the watermark reaches `step`. The same again changes nothing."""
        fresh = self._fresh.get(step)
        if fresh is None:
            fresh = self._fresh[step] = set()
            heapq.heappush(self._steps, step)
        fresh.add((user, behind))

    def due(self, before: int, upto: int) -> list[Due]:
        """Every user once, by key, who has something due as the watermark moves from `before` to `upto`."""
        found: dict[bytes, int | None] = {}
        while self._steps and self._steps[0] <= upto:
            for user, behind in self._fresh.pop(heapq.heappop(self._steps)):
                found[user] = _older(found.get(user), behind)
        if self._quiet_until <= upto:
            for key, step, user, behind in self._store.due(max(before, -1)):
                self._quiet_until = step
                if step > upto:
                    break
                self._closed.append(key)
                found[user] = _older(found.get(user), behind)
            else:
                self._quiet_until = codec.LAST_STEP
        return sorted(found.items())

    def write(self, batch: Batch) -> None:
        """Put what is open into the batch that goes to the store now, take what has closed out of it."""
        for key in self._closed:
            batch.delete("due", key)
        for step, fresh in self._fresh.items():
            self._quiet_until = min(self._quiet_until, step)
            batch.put_all("due", ((codec.due_key(step, user, behind), b"") for user, behind in fresh))
        self._fresh, self._steps, self._closed = {}, [], []


def _older(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
