"""Other ways to map ids to slots, at their cheapest: they keep no scores, no times to live and no pins.

Each has `find(keys) -> i64[n]` (-1: no slot), `map(keys) -> i64[n]`, which gives every new id a slot, `save` and
`restore` around a run, and `nbytes`. `map` never evicts: the runs end before a table is full.
"""

import sys
from typing import Any

import numpy as np

from streamgr.model.hashing import I64, U64, fmix64
from streamgr.model.index import Index

NO_KEY = np.uint64(0)  # the linear probe's mark of an empty slot: like most of its kind it cannot hold that id
PROBES = 128  # as MPZCH has it
TIME_MS = 1_700_000_000_000


class Ours:
    """`streamgr.model.index.Index`, which besides keeps each id's score, life and pin."""

    def __init__(self, size: int, width: int) -> None:
        self.index = Index(size, width, lives_ms=[1 << 40], half_life_ms=1 << 38)

    def find(self, keys: U64) -> I64:
        return self.index.find(keys, TIME_MS)

    def map(self, keys: U64) -> I64:
        return self.index.map(keys, np.full(len(keys), TIME_MS), 0, watermark_ms=TIME_MS).slots

    def save(self) -> Any:
        return self.index.state()

    def restore(self, saved: Any) -> None:
        self.index.load_state(saved)

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in vars(self.index).values() if isinstance(column, np.ndarray))


class Dict:
    """A Python dict, asked id by id."""

    def __init__(self, size: int) -> None:
        self.slots: dict[int, int] = {}

    def find(self, keys: U64) -> I64:
        get = self.slots.get
        return np.array([get(key, -1) for key in keys.tolist()])

    def map(self, keys: U64) -> I64:
        slots = self.slots
        setdefault = slots.setdefault
        return np.array([setdefault(key, len(slots)) for key in keys.tolist()])

    def save(self) -> Any:
        return len(self.slots)

    def restore(self, saved: Any) -> None:
        while len(self.slots) > saved:
            self.slots.popitem()

    @property
    def nbytes(self) -> int:
        key, slot = next(iter(self.slots.items()))
        return sys.getsizeof(self.slots) + len(self.slots) * (sys.getsizeof(key) + sys.getsizeof(slot))


class Modulo:
    """`id % size`: nothing to look up, and ids collide."""

    nbytes = 0

    def __init__(self, size: int) -> None:
        self._size = np.uint64(size)

    def find(self, keys: U64) -> I64:
        return (keys % self._size).view(np.int64)

    map = find

    def save(self) -> Any:
        return None

    def restore(self, saved: Any) -> None:
        pass


class SortedSearch:
    """Binary search in sorted ids (ZCH, which merges once in several batches; here each batch can use its new ids)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.keys: U64 = np.empty(0, np.uint64)
        self.slots: I64 = np.empty(0, np.int64)

    def find(self, keys: U64) -> I64:
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self.keys, keys)
        at[at == len(self.keys)] = 0
        return np.where(self.keys[at] == keys, self.slots[at], -1)

    def map(self, keys: U64) -> I64:
        slots = self.find(keys)
        missed = np.flatnonzero(slots < 0)
        if len(missed):
            new, inverse = np.unique(keys[missed], return_inverse=True)
            given = len(self.keys) + np.arange(len(new))
            at = np.searchsorted(self.keys, new)
            self.keys, self.slots = np.insert(self.keys, at, new), np.insert(self.slots, at, given)
            slots[missed] = given[inverse]
        return slots

    def save(self) -> Any:
        return self.keys, self.slots

    def restore(self, saved: Any) -> None:
        self.keys, self.slots = saved

    @property
    def nbytes(self) -> int:
        return self._size * 16


class LinearProbe:
    """Open addressing, `PROBES` slots in a row at most (MPZCH); an id that finds none shares its first (`collided`)."""

    def __init__(self, size: int) -> None:
        """`size`: a power of two."""
        self._mask = np.uint64(size - 1)
        self.keys: U64 = np.full(size, NO_KEY)
        self.collided = 0

    def find(self, keys: U64) -> I64:
        slots = np.full(len(keys), -1)
        at, who = (fmix64(keys) & self._mask).view(np.int64), np.arange(len(keys))
        for _ in range(PROBES):
            there = self.keys[at]
            found = there == keys[who]
            slots[who[found]] = at[found]
            more = ~found & (there != NO_KEY)  # nobody is ever taken out, so an empty slot ends a run
            who, at = who[more], (at[more] + 1) & int(self._mask)
            if not len(who):
                break
        return slots

    def map(self, keys: U64) -> I64:
        slots = self.find(keys)
        missed = np.flatnonzero(slots < 0)
        if len(missed):
            new, inverse = np.unique(keys[missed], return_inverse=True)
            slots[missed] = self._insert(new)[inverse]
        return slots

    def _insert(self, new: U64) -> I64:
        first = (fmix64(new) & self._mask).view(np.int64)
        slots, at, who = first.copy(), first, np.arange(len(new))
        for _ in range(PROBES):
            free = self.keys[at] == NO_KEY
            self.keys[at[free]] = new[who[free]]  # of several the last one stays
            placed = self.keys[at] == new[who]
            slots[who[placed]] = at[placed]
            who, at = who[~placed], (at[~placed] + 1) & int(self._mask)
            if not len(who):
                break
        self.collided += len(who)
        return slots

    def save(self) -> Any:
        return self.keys.copy(), self.collided

    def restore(self, saved: Any) -> None:
        self.keys[:], self.collided = saved

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes
