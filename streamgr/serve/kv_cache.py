"""The histories that one version of the weights has been through, kept between requests: a bounded LRU.

A cache belongs to the weights that it was computed with, so each version that is served has a store of its own, which
is emptied when the next one takes its place: no key can be confused, and no row outlives its weights. Within a version
nothing ever becomes wrong: what a user's history is now is compared with what was kept, token by token
(`model.cache.Cache.reusable`), and what differs is computed again. Any number of threads may ask and keep; values are
immutable, and of two that keep the same user's at once the later one stays.

The window of a user's history may outgrow `history_length` while it is kept, up to the slack: if it slid with every
event, its first token would change each time, and with it every row.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from streamgr.events import PROFILE, History
from streamgr.model.cache import Cache
from streamgr.telemetry import counter, gauge

REQUESTS = counter(
    "cache_requests", "Histories asked for: all of it kept (hit), a part of it (extended), nothing.", ("outcome",)
)
BYTES = gauge("cache_bytes", "What the caches of the served version hold.")
EVICTIONS = counter("cache_evictions", "Users' caches that made room for others.")
OBJECTS_BYTES = 4_096  # of an entry: what surrounds its columns, about

Outcome = Literal["hit", "extended", "miss"]
for _outcome in ("hit", "extended", "miss"):
    REQUESTS.labels(_outcome)  # 0 is a value too


@dataclass(frozen=True, slots=True)
class Entry:
    """A user's cache. first: the event with which its window begins (one row, or none)."""

    first: History
    cache: Cache

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + OBJECTS_BYTES

    def goes_on(self, history: History, least: int, most: int) -> int | None:
        """How many of a user's newest events are those that go on from the kept window; None where that is of no use.

        They must be at least the `least` newest, or all there are, and at most `most`.
        """
        shown = history.take(np.flatnonzero(history.kinds != PROFILE))
        if not len(self.first):
            return None
        begins = (shown.times == self.first.times[0]) & (shown.items == self.first.items[0])
        begins &= (shown.kinds == self.first.kinds[0]) & (shown.requests == self.first.requests[0])
        for row in np.flatnonzero(begins):
            if min(least, len(shown)) <= len(shown) - row <= most:
                return len(shown) - int(row)
        return None


class KvCache:
    """One version's store. limit_bytes 0: nothing is kept, or counted."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # oldest use first
        self._lock = threading.Lock()

    @property
    def on(self) -> bool:
        return self._limit > 0

    def get(self, user: str) -> Entry | None:
        """What was kept of this user last."""
        with self._lock:
            if entry := self._entries.get(user):
                self._entries.move_to_end(user)
            return entry

    def keep(self, user: str, window: History, cache: Cache, outcome: Outcome) -> None:
        """Keep this from now on, and let go of what has not been asked for longest where it does not fit."""
        if not self.on:
            return
        REQUESTS.labels(outcome).inc()
        entry = Entry(window.take(np.flatnonzero(window.kinds != PROFILE)[:1]), cache)
        with self._lock:
            self._drop(user)
            if not len(window) or entry.nbytes > self._limit:
                return
            while self._bytes + entry.nbytes > self._limit:
                self._drop(next(iter(self._entries)))
                EVICTIONS.inc()
            self._entries[user] = entry
            self._count(entry.nbytes)

    def close(self) -> None:
        """Other weights are served now: let go of everything; requests still at work keep nothing more."""
        with self._lock:
            self._limit = 0
            self._entries.clear()
            self._count(-self._bytes)

    def _drop(self, user: str) -> None:
        if entry := self._entries.pop(user, None):
            self._count(-entry.nbytes)

    def _count(self, more: int) -> None:
        self._bytes += more
        BYTES.inc(more)


def events(history: History) -> int:
    """How many impressions and actions; what stands beside them of the user's features is not counted."""
    return int(np.count_nonzero(history.kinds != PROFILE))
