"""The index of the ID table as its docstring tells it, one key at a time: dictionaries, loops and Python's integers.

Nothing of the index is used here, nor of `decay` and `hashing`; only the admission sketch, which has tests of its own.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from streamgr.model.admission import Sketch

MASK = 2**64 - 1
BEFORE_ALL = -(2**63) + 1


def fmix64(key: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key = (key ^ (key >> 33)) * factor & MASK
    return key ^ (key >> 33)


def homes(key: int, slots: int, width: int) -> list[range]:
    """The slots of the key's two buckets."""
    white, buckets = fmix64(key), slots // width
    apart = (fmix64(white ^ 0x9E3779B97F4A7C15) >> 32) | 1
    both = [(white >> 32) % buckets, ((white >> 32) ^ apart) % buckets]
    return [range(bucket * width, (bucket + 1) * width) for bucket in both]


def add(a: int, b: int) -> int:
    """log2(2^a + 2^b) in 2^-20, by steps of 2^-12."""
    gap = (abs(a - b) >> 8) / 4096
    return max(a, b) + (round(math.log2(1 + 2**-gap) * 2**20) if gap < 26 else 0)


@dataclass
class Held:
    """What a slot holds."""

    key: int
    until: int
    score: int
    field: int
    pin: int


@dataclass
class Oracle:
    slots: int
    width: int
    lives: list[int]
    half_life: int
    admit_min: int = 1
    pin_depth: int = 0
    sketch: Sketch | None = None
    held: dict[int, Held] = field(default_factory=dict)  # by slot; an expired one stays until somebody takes its place
    watermark: int = BEFORE_ALL
    batches: int = 0
    total: int | None = None
    admissions: int = 0
    evictions: int = 0
    unadmitted: int = 0
    unplaced: int = 0
    stale: int = 0

    def score(self, time: int, count: int) -> int:
        return (min(max(time, 0), 2**46) << 20) // self.half_life + round(math.log2(count) * 2**20)

    def homes(self, key: int) -> list[range]:
        return homes(key, self.slots, self.width)

    def live(self, slot: int, watermark: int) -> bool:
        return slot in self.held and self.held[slot].until >= watermark

    def pinned(self, slot: int) -> bool:
        return slot in self.held and self.held[slot].pin >= self.batches - self.pin_depth

    def find(self, key: int, watermark: int) -> int:
        return next((s for h in self.homes(key) for s in h if self.live(s, watermark) and self.held[s].key == key), -1)

    def map(self, batch: list[tuple[int, int, int]], watermark: int) -> dict[int, int]:
        """(key, time, field) of each token; returns the slot of each key, -1 without one."""
        self.watermark, self.batches = max(self.watermark, watermark), self.batches + 1
        if batch:
            seen = self.score(max(time for _, time, _ in batch), len(batch))
            self.total = seen if self.total is None else add(self.total, seen)
        times = {key: [t for k, t, _ in batch if k == key] for key, _, _ in batch}
        found = {key: self.find(key, self.watermark) for key in times}
        for key, slot in found.items():
            if slot >= 0:
                old, newest = self.held[slot], max(times[key])
                until = max(old.until, min(newest + self.lives[old.field], 2**63 - 1))
                score = add(old.score, self.score(newest, len(times[key])))
                self.held[slot] = Held(key, until, score, old.field, self.batches)
        new = {}
        for key in sorted(key for key, slot in found.items() if slot < 0):
            kind, newest = min(f for k, _, f in batch if k == key), max(times[key])
            until = min(newest + self.lives[kind], 2**63 - 1)
            if until < self.watermark:
                self.stale += 1
            else:
                new[key] = Held(key, until, self.score(newest, len(times[key])), kind, self.batches)
        if self.sketch is not None:
            counts = self.sketch.count(np.array([*new], np.uint64), np.array([len(times[k]) for k in new], np.int64))
            refused = [key for key, count in zip(new, counts, strict=True) if count < self.admit_min]
            self.unadmitted += len(refused)
            new = {key: held for key, held in new.items() if key not in refused}
        while turned := self.turn(new):
            for home, keys in turned.items():
                for key, slot in zip(keys, self.free(home) or [self.lowest(home)], strict=False):
                    self.evictions += self.live(slot, self.watermark)
                    self.admissions += 1
                    self.held[slot] = new.pop(key)
                    found[key] = slot
        self.unplaced += len(new)
        return found

    def turn(self, new: dict[int, Held]) -> dict[range, list[int]]:
        """One round: to which bucket each key turns, smallest first; without those who can be placed nowhere."""
        turned: dict[range, list[int]] = {}
        for key in new:
            can = [home for home in self.homes(key) if self.free(home) or self.lowest(home) >= 0]
            if any(self.free(home) for home in can):
                turned.setdefault(max(can, key=lambda home: len(self.free(home))), []).append(key)
            elif can:
                turned.setdefault(min(can, key=lambda home: self.held[self.lowest(home)].score), []).append(key)
        return turned

    def free(self, home: range) -> list[int]:
        return [slot for slot in home if not self.live(slot, self.watermark) and not self.pinned(slot)]

    def lowest(self, home: range) -> int:
        """The slot of the lowest score that is not pinned, -1 without one."""
        return min((s for s in home if not self.pinned(s)), key=lambda s: (self.held[s].score, s), default=-1)

    def grow(self) -> None:
        old, self.held = self.held, {}
        for slot, held in old.items():
            which = 0 if slot in self.homes(held.key)[0] else 1
            home = homes(held.key, 2 * self.slots, self.width)[which]
            self.held[home[slot % self.width]] = held
        self.slots *= 2
