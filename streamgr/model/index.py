"""The index of an ID table: which key holds which slot, and since when. Integers only, so a replay is exact.

A key may live in any of the W slots of two hashed buckets, so every answer costs two short reads however full the
table is, and no key ever moves. Each slot has a one-byte tag; the tags of eight slots are one machine word and are
compared at once, so keys are read only where a tag agrees.

What decides, and on nothing else does a result depend (not on the order of a batch, not on when it was swept):

- Expiry: a slot holds its key while `until_ms` >= the watermark. `until_ms` is the newest time at which the key was
  seen plus the life of its field. Beyond that the slot is free, at once, though its bytes stay until somebody takes it;
  nothing sweeps. Who has expired is a difference: admissions - evictions - live.
- A batch counts each key once, with its newest time, how often it came and, where it is new, the lowest field named
  with it (a held key keeps its own). First those that are held are touched. Of the others, who would have expired
  already is "stale"; who the sketch, if there is one, has counted fewer than `admit_min` times is "unadmitted"; the
  rest is placed.
- The score is the forward-decayed count (`decay`): a batch adds `at(newest) + times(count)` to that of a key that it
  finds and starts that of a key that it places. All tokens of a batch, whatever becomes of them, go to `total` in the
  same way, at the newest time among them; a key's `share` is its score in that.
- Placing runs in rounds. In each, every key still without a slot turns to the bucket of its two with more free slots,
  the first if they are equal; where neither has any, to the one whose lowest unpinned score is lower, again the first
  if they are equal. Of those who turn to a bucket with free slots the smallest keys take them, both in ascending order;
  of those who turn to a full one the smallest key evicts the lowest score, of equal ones the lowest slot. Rounds end
  when nobody is waiting who can be placed; who is left is "unplaced".
- A slot that one of the last `pin_depth` + 1 batches has touched (empty batches count) is pinned: neither free nor
  evicted, so no row changes hands between the batch that looked it up and the gradient that comes back to it. A pinned
  slot may expire: its key is then a miss, and placed elsewhere when it returns.

`map` changes the index (training), `find` only reads (serving). The slow twin is the oracle in the tests; the one on a
GPU is `index_triton`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgr.model import decay
from streamgr.model.admission import Sketch
from streamgr.model.hashing import I64, U64, first_buckets, fmix64, second_buckets, tags

EMPTY = int(np.iinfo(np.int64).min)  # `until_ms` of a slot that has never held anything: no watermark lies before it
FOREVER = int(np.iinfo(np.int64).max)
BLOCK = 1 << 14  # keys that are looked up together: their temporaries stay in the cache
GROUP = 8  # slots whose tags are one word

_ONES, _TOPS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_ONE, _THREE = np.uint64(1), np.uint64(3)


@dataclass(frozen=True, slots=True)
class Mapped:
    """What became of a batch of n keys.

    slots i64[n]: -1 where a key has none. fresh i64[k], ascending: slots that this batch has given to another key, and
    fresh_keys u64[k] to whom.
    """

    slots: I64
    fresh: I64
    fresh_keys: U64


@dataclass(slots=True)
class Tally:
    """What has happened to keys, counted once a batch each: none is dropped without a name."""

    admissions: int = 0
    evictions: int = 0
    unadmitted: int = 0  # not come often enough yet
    unplaced: int = 0  # both buckets were pinned
    stale: int = 0  # older than a life when they came


class Index:
    """Keys to slots; one owner, not thread safe."""

    def __init__(
        self,
        slots: int,
        width: int,
        *,
        lives_ms: Sequence[int],
        half_life_ms: int,
        sketch: Sketch | None = None,
        admit_min: int = 1,
        pin_depth: int = 0,
    ) -> None:
        """slots: `width` times a power of two; width: a multiple of 8. lives_ms: of each field's keys.

        half_life_ms: of the scores, 1 000 to 2^42. pin_depth: how many batches may be on their way beside this one.
        """
        self.width, self._half_life_ms = width, half_life_ms
        self._lives = np.array(lives_ms, np.int64)
        self._sketch, self._admit_min, self._pin_depth = sketch, admit_min, pin_depth
        self.watermark, self.total, self.batch = EMPTY + 1, decay.NEVER, 0
        self.tally = Tally()
        self._lay(slots)

    def _lay(self, slots: int) -> None:
        """Empty columns of so many slots."""
        self.buckets = slots // self.width
        self.keys: U64 = np.zeros(slots, np.uint64)
        self.until_ms: I64 = np.full(slots, EMPTY, np.int64)
        self.score: I64 = np.full(slots, decay.NEVER, np.int64)
        self.field: NDArray[np.uint8] = np.zeros(slots, np.uint8)
        self.tag: NDArray[np.uint8] = np.zeros(slots, np.uint8)
        self.pin: NDArray[np.int32] = np.full(slots, np.iinfo(np.int32).min, np.int32)
        self._scratch: NDArray[np.int32] = np.zeros(slots, np.int32)

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self.keys)

    # --- reading

    def find(self, keys: U64, watermark_ms: int) -> I64:
        """The slot i64[n] of each key u64[n] at a watermark, -1 without one. Changes nothing."""
        if len(keys) <= BLOCK:
            return self._find(keys, watermark_ms)
        parts = [self._find(keys[at : at + BLOCK], watermark_ms) for at in range(0, len(keys), BLOCK)]
        return np.concatenate(parts)

    def live(self, watermark_ms: int, field: int | None = None) -> I64:
        """The slots i64[k], ascending, that hold something at a watermark (of one field)."""
        held = self.until_ms >= max(watermark_ms, EMPTY + 1)
        if field is not None:
            held &= self.field == field
        return np.flatnonzero(held)

    def draw(self, count: int, field: int, watermark_ms: int, rng: np.random.Generator) -> I64:
        """`count` slots i64[count] that hold a key of the field, uniformly with repetition; none where none do.

        By rejection, a round at a time; where few slots would do, from the list of those that do.
        """
        found: list[I64] = []
        missing, oldest = count, max(watermark_ms, EMPTY + 1)
        for _ in range(4):
            drawn = rng.integers(0, len(self), max(1024, 2 * missing))
            kept = drawn[(self.until_ms[drawn] >= oldest) & (self.field[drawn] == field)][:missing]
            found.append(kept)
            missing -= len(kept)
            if not missing:
                return np.concatenate(found)
        some = self.live(watermark_ms, field)
        if not len(some):
            return some
        return np.concatenate([*found, some[rng.integers(0, len(some), missing)]])

    def share(self, slots: I64) -> NDArray[np.float64]:
        """f64[n]: the chance that a token drawn from the recent past (by the half life) is this slot's key."""
        return decay.ratio(self.score[slots], self.total)

    def _find(self, keys: U64, watermark_ms: int) -> I64:
        slots = np.full(len(keys), -1, np.int64)
        oldest, white = max(watermark_ms, EMPTY + 1), fmix64(keys)
        pattern = tags(white) * _ONES
        bucket = first_buckets(white, self.buckets)
        self._search(slots, keys, pattern, bucket, np.arange(len(keys)), oldest)
        left = np.flatnonzero(slots < 0)
        if len(left):
            self._search(slots, keys[left], pattern[left], second_buckets(white[left], self.buckets), left, oldest)
        return slots

    def _search(self, slots: I64, keys: U64, pattern: U64, bucket: I64, into: I64, oldest: int) -> None:  # noqa: PLR0917
        """Look for the keys in one bucket each; what is found goes to slots[into].

        `(x - 1) & ~x & 0x80` in each byte is set where a byte of x is zero, that is where a tag agrees; a borrow can
        set it above one as well, which the key itself then denies.
        """
        words = self.tag.view(np.uint64)
        groups = self.width // GROUP
        for group in range(groups):
            at = bucket * groups + group if groups > 1 else bucket
            x = words[at] ^ pattern
            agree = (x - _ONES) & ~x & _TOPS
            where = np.flatnonzero(agree)
            agree = agree[where]
            while len(where):
                low = (agree & (~agree + _ONE)) - _ONE
                slot = at[where] * GROUP + (np.bitwise_count(low) >> 3)
                hit = (self.keys[slot] == keys[where]) & (self.until_ms[slot] >= oldest)
                slots[into[where[hit]]] = slot[hit]
                agree = agree & (agree - _ONE)
                more = ~hit & (agree != 0)
                where, agree = where[more], agree[more]

    # --- mapping

    def map(self, keys: U64, times: I64, fields: NDArray[np.uint8] | int, *, watermark_ms: int) -> Mapped:
        """Admit, touch and evict: keys u64[n], times i64[n] (event ms), fields u8[n], in any order, repeats allowed.

        The watermark never moves back: a lower one counts as the highest so far.
        """
        self.watermark = max(self.watermark, watermark_ms)
        self.batch += 1
        if len(keys):
            self.total = int(decay.add(np.array(self.total), self._seen(times.max()[None], np.array([len(keys)])))[0])
        slots = self.find(keys, self.watermark)
        hit = np.flatnonzero(slots >= 0)
        self._touch(slots[hit], times[hit])
        missed = np.flatnonzero(slots < 0)
        if not len(missed):
            return Mapped(slots, np.zeros(0, np.int64), np.zeros(0, np.uint64))
        new, inverse, counts = np.unique(keys[missed], return_inverse=True, return_counts=True)
        newest = np.full(len(new), EMPTY, np.int64)
        np.maximum.at(newest, inverse, times[missed])
        kinds = np.full(len(new), fields if isinstance(fields, int) else np.iinfo(np.uint8).max, np.uint8)
        if not isinstance(fields, int):
            np.minimum.at(kinds, inverse, fields[missed])
        until = _after(newest, self._lives[kinds])

        wanted = np.flatnonzero(until >= self.watermark)
        self.tally.stale += len(new) - len(wanted)
        if self._sketch is not None:
            often = self._sketch.count(new[wanted], counts[wanted]) >= self._admit_min
            self.tally.unadmitted += len(often) - int(np.count_nonzero(often))
            wanted = wanted[often]
        taken = self._place(new[wanted], until[wanted])
        self.tally.unplaced += int(np.count_nonzero(taken < 0))
        placed = wanted[taken >= 0]
        fresh = taken[taken >= 0]
        self.field[fresh] = kinds[placed]
        self.score[fresh] = self._seen(newest[placed], counts[placed])
        where = np.full(len(new), -1, np.int64)
        where[placed] = fresh
        slots[missed] = where[inverse]
        order = np.argsort(fresh)
        return Mapped(slots, fresh[order], new[placed][order])

    def _seen(self, newest: I64, counts: I64) -> I64:
        return decay.at(newest, self._half_life_ms) + decay.times(counts)

    def _touch(self, slots: I64, times: I64) -> None:
        """Every hit of a batch: i64[n] slots and times, repeats allowed.

        Repeats are gathered by a scatter (the last writer of a slot speaks for it), not by a sort.
        """
        if not len(slots):
            return
        here = np.arange(len(slots), dtype=np.int32)
        self._scratch[slots] = here
        speaker = self._scratch[slots]
        speaks = speaker == here
        touched = slots[speaks]
        counts, newest = np.ones(len(touched), np.int64), times[speaks]
        if len(touched) < len(slots):
            inverse = (np.cumsum(speaks) - 1)[speaker]
            counts = np.bincount(inverse, minlength=len(touched))
            newest = newest.copy()
            np.maximum.at(newest, inverse, times)
        self.until_ms[touched] = np.maximum(self.until_ms[touched], _after(newest, self._lives[self.field[touched]]))
        self.score[touched] = decay.add(self.score[touched], self._seen(newest, counts))
        self.pin[touched] = self.batch

    def _place(self, keys: U64, until: I64) -> I64:
        """Slots i64[n] for distinct ascending keys, -1 where everything is pinned; they hold them from now on."""
        taken = np.full(len(keys), -1, np.int64)
        white = fmix64(keys)
        both = np.stack([first_buckets(white, self.buckets), second_buckets(white, self.buckets)], 1)
        waiting = np.arange(len(keys))
        pins, untils, scores = (column.reshape(-1, self.width) for column in (self.pin, self.until_ms, self.score))
        while len(waiting):
            two = both[waiting]  # a bucket is taken as one row, which costs half of what its slots cost one by one
            pinned = pins.take(two, 0) >= self.batch - self._pin_depth  # [n, 2, W]
            free = (untils.take(two, 0) < self.watermark) & ~pinned
            room = free.sum(2)
            cost = np.where(pinned, FOREVER, scores.take(two, 0))
            lowest = cost.min(2)
            some = room.any(1)
            second = np.where(some, room[:, 1] > room[:, 0], lowest[:, 1] < lowest[:, 0]).astype(np.int64)
            n = np.arange(len(waiting))
            can = np.flatnonzero(some | (lowest[n, second] < FOREVER))
            order = can[np.argsort(two[can, second[can]], kind="stable")]  # by bucket, then by key
            bucket = two[order, second[order]]
            rank = _rank(bucket)
            free, cost = free[order, second[order]], cost[order, second[order]]
            chosen = np.where(some[order], (np.cumsum(free, 1) == rank[:, None] + 1).argmax(1), cost.argmin(1))
            wins = rank < np.where(some[order], free.sum(1), 1)
            who, slot = waiting[order[wins]], (bucket * self.width + chosen)[wins]
            self.tally.admissions += len(who)
            self.tally.evictions += int(np.count_nonzero(~some[order[wins]]))
            self.keys[slot], self.until_ms[slot], self.pin[slot] = keys[who], until[who], self.batch
            self.tag[slot] = tags(white[who])
            taken[who] = slot
            waiting = np.setdiff1d(waiting[can], who, assume_unique=True)
        return taken

    # --- moving

    def put(self, slots: I64, keys: U64, until_ms: I64, field: NDArray[np.uint8]) -> None:
        """Make slots hold exactly this; their scores are those of one event at the end of their lives."""
        self.keys[slots], self.until_ms[slots], self.field[slots] = keys, until_ms, field
        self.tag[slots] = tags(fmix64(keys))
        self.score[slots] = decay.at(until_ms, self._half_life_ms)

    def homes(self, keys: U64) -> tuple[I64, I64]:
        """The two buckets, i64[n] each, in which each key may live."""
        white = fmix64(keys)
        return first_buckets(white, self.buckets), second_buckets(white, self.buckets)

    def grow(self) -> I64:
        """Twice the slots. Every bucket splits in two by one more bit of its keys' hashes; nobody is displaced.

        A key that was in its first bucket is in its first bucket again, else in its second, at the same place in it.
        Returns where each old slot has gone, i64[old slots].
        """
        bucket, column = np.divmod(np.arange(len(self)), self.width)
        stays = self.homes(self.keys)[0] == bucket
        old = {name: getattr(self, name) for name in COLUMNS}
        self._lay(2 * len(self))
        first, second = self.homes(old["keys"])
        moved = np.where(stays, first, second) * self.width + column
        moved = np.where(old["until_ms"] == EMPTY, bucket * self.width + column, moved)
        for name, values in old.items():
            getattr(self, name)[moved] = values
        return moved

    def state(self) -> dict[str, NDArray[Any]]:
        """A copy of everything, for checkpoints."""
        t = self.tally
        scalars = [self.watermark, self.total, self.batch]
        scalars += [t.admissions, t.evictions, t.unadmitted, t.unplaced, t.stale]
        found: dict[str, NDArray[Any]] = {name: getattr(self, name).copy() for name in COLUMNS}
        found["scalars"] = np.array(scalars, np.int64)
        if self._sketch is not None:
            found["sketch"], found["sketch_counted"] = self._sketch.cells.copy(), np.array([self._sketch.counted])
        return found

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Become what `state` was taken from; it must be of an index with the same settings, of any size."""
        self._lay(len(state["keys"]))
        for name in COLUMNS:
            getattr(self, name)[:] = state[name]
        self.watermark, self.total, self.batch, *tally = (int(x) for x in state["scalars"])
        self.tally = Tally(*tally)
        if self._sketch is not None:
            self._sketch.cells[:] = state["sketch"]
            self._sketch.counted = int(state["sketch_counted"][0])


COLUMNS = ("keys", "until_ms", "score", "field", "tag", "pin")


def _after(times: I64, lives: I64) -> I64:
    """times + lives, as late as there is."""
    return np.minimum(times, FOREVER - lives) + lives


def _rank(groups: I64) -> I64:
    """The place i64[n] of each among those of its own group; equal groups lie together."""
    n = np.arange(len(groups))
    begins = np.ones(len(groups), bool)
    begins[1:] = groups[1:] != groups[:-1]
    return n - np.maximum.accumulate(np.where(begins, n, 0))
