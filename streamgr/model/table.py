"""The ID table: 64-bit ids to embedding rows, without collisions, with expiry. The plain vectorised version.

Rows: 0 is zeros; 1..F are shared fallback rows; slot s is row 1+F+s. A key may live in any of the W slots of two
hashed buckets. A key without a slot is the mean of two fallback rows, which are trained like any other; on admission a
slot starts as exactly that mean, so admitting a key changes no prediction, and a scorer that has not heard of it yet
answers the same.

- Expiry: a slot whose key was last seen more than `ttl_seconds` before the watermark holds nothing, at once.
- Eviction: when both buckets are full the lowest score goes. The score is log2 of the forward-decayed count, in fixed
  point: log2 sum_i 2^(t_i / half life). Its order never changes with time, so nothing ages in the background; a short
  half life gives LRU, a long one LFU. A slot that this batch has touched is never taken.
- Order: placing runs in rounds. In each, every key still without a slot asks for the lowest slot of its two buckets
  (a free one before any other) and the smallest key of those asking for a slot gets it. So the result does not depend
  on the order of the batch. Rounds end when nobody can be placed; who is left is "unplaced" and uses fallback rows.

`map` changes the table (training); `lookup` only reads (serving). Everything is integers, so a replay is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.errors import ConfigError, DataError
from streamgr.model.admission import Sketch
from streamgr.model.hashing import U64, buckets, fallback_rows

I64 = NDArray[np.int64]

EMPTY = int(np.iinfo(np.int64).min)  # `last_ms` of a slot that holds nothing
INIT_STD = 0.02
FRACTION = 20  # bits after the point of a score
LATEST_MS = 1 << 46  # scores take later times (past the year 4199) as this one, so that no product overflows
SOFTPLUS_STEP = 8  # the table below resolves 2^-12
SOFTPLUS = np.rint(np.log2(1 + np.exp2(-np.arange(26 << 12) / 4096.0)) * (1 << FRACTION)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows of n keys: rows_a i64[n], rows_b i64[n] (equal for a slot, two fallback rows otherwise).

    fresh i64[k]: rows given to another key by this `map`; their optimizer state must start anew.
    """

    rows_a: I64
    rows_b: I64
    fresh: I64


@dataclass(frozen=True, slots=True)
class TableStats:
    """used = admissions - evictions - expiries; unplaced counts keys that found both buckets taken by their batch."""

    slots: int
    used: int
    admissions: int
    evictions: int
    expiries: int
    unplaced: int


class IdTable:
    """The table and its weights; one owner, not thread safe. `weight` is f32[1 + F + slots, dim]."""

    def __init__(self, settings: config.Table, dim: int, seed: int) -> None:
        self.settings, self.dim = settings, dim
        self.first_slot = 1 + settings.fallback_rows
        self._width = settings.bucket_width
        self._buckets = settings.slots // settings.bucket_width
        self._ttl_ms = milliseconds(settings.ttl_seconds)
        half_life = settings.half_life_seconds or settings.ttl_seconds / 4
        self._half_life_ms = min(max(milliseconds(half_life), 1000), 1 << 42)

        self._keys: U64 = np.zeros(settings.slots, np.uint64)
        self._last_ms: I64 = np.full(settings.slots, EMPTY, np.int64)
        self._score: I64 = np.zeros(settings.slots, np.int64)
        self._changed: I64 = np.full(self.first_slot + settings.slots, -1, np.int64)
        self._mark = 0
        self._watermark = EMPTY
        self._admissions = self._evictions = self._expiries = self._unplaced = 0
        self._sketch = Sketch(settings.slots) if settings.admit_min > 1 else None

        self.weight = torch.zeros(self.first_slot + settings.slots, dim)
        generator = torch.Generator().manual_seed(seed)
        self.weight[1 : self.first_slot].normal_(0, INIT_STD, generator=generator)

    # -- keys to rows

    def map(self, keys: U64, times: I64, *, watermark_ms: int) -> Lookup:
        """Rows for training: admit, touch and evict. keys u64[n], times i64[n] (event ms), any order, repeats allowed.

        The watermark never moves back: a lower one counts as the highest so far.
        """
        self._watermark = max(self._watermark, watermark_ms)
        self._expire()
        unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        newest = np.full(len(unique), EMPTY, np.int64)
        np.maximum.at(newest, inverse, times)

        slots = self._find(unique, self._horizon(self._watermark))
        found = slots >= 0
        held = np.zeros(self.settings.slots, bool)  # touched by this batch: not to be evicted
        held[slots[found]] = True
        self._touch_slots(slots[found], newest[found], counts[found])

        wanted = np.flatnonzero(~found & (newest >= self._horizon(self._watermark)))
        if self._sketch is not None:
            wanted = wanted[self._sketch.count(unique[wanted], counts[wanted]) >= self.settings.admit_min]
        slots[wanted] = self._place(unique[wanted], held)
        placed = wanted[slots[wanted] >= 0]
        self._unplaced += len(wanted) - len(placed)
        self._settle(slots[placed], unique[placed], newest[placed], counts[placed])
        a, b = self._rows(unique, slots)
        return Lookup(a[inverse], b[inverse], self.first_slot + np.sort(slots[placed]))

    def lookup(self, keys: U64, *, watermark_ms: int) -> Lookup:
        """Rows for reading, u64[n] -> rows; changes nothing."""
        a, b = self._rows(keys, self._find(keys, self._horizon(watermark_ms)))
        return Lookup(a, b, np.zeros(0, np.int64))

    def vectors(self, lookup: Lookup) -> Tensor:
        """f32[n, dim]: (weight[a] + weight[b]) / 2, exactly the row itself for a slot."""
        a, b = torch.from_numpy(lookup.rows_a), torch.from_numpy(lookup.rows_b)
        return (self.weight.index_select(0, a) + self.weight.index_select(0, b)) / 2

    def live(self, watermark_ms: int) -> tuple[I64, U64]:
        """The rows i64[k] (ascending) and keys u64[k] that hold something at this watermark."""
        slots = np.flatnonzero(self._last_ms >= self._horizon(watermark_ms))
        return slots + self.first_slot, self._keys[slots]

    def stats(self) -> TableStats:
        used = int(np.count_nonzero(self._last_ms != EMPTY))
        return TableStats(self.settings.slots, used, self._admissions, self._evictions, self._expiries, self._unplaced)

    # -- what has changed, and moving it

    def mark(self) -> int:
        """Begin a new interval; `changed_since` of the value returned gives what changes from now on."""
        self._mark += 1
        return self._mark

    def touch(self, rows: I64) -> None:
        """Note that the weights of `rows` have changed."""
        self._changed[rows] = self._mark

    def changed_since(self, mark: int) -> I64:
        """Rows i64[k], ascending, whose weights, key or last time changed at or after `mark`."""
        return np.flatnonzero(self._changed >= mark)

    def snapshot_rows(self, watermark_ms: int) -> I64:
        """Rows i64[k], ascending, that a snapshot must hold: the fallback rows and every live slot."""
        return np.concatenate([np.arange(1, self.first_slot), self.live(watermark_ms)[0]])

    def rows(self, rows: I64) -> dict[str, Tensor]:
        """A copy of rows: "rows" i64[k], "keys" i64[k] (u64 bits), "last_ms" i64[k], "weight" f32[k, dim].

        Fallback rows have key 0 and the `last_ms` of an empty slot.
        """
        slots = rows - self.first_slot
        is_slot = slots >= 0
        keys, last_ms = np.zeros(len(rows), np.uint64), np.full(len(rows), EMPTY, np.int64)
        keys[is_slot], last_ms[is_slot] = self._keys[slots[is_slot]], self._last_ms[slots[is_slot]]
        index = torch.from_numpy(rows.astype(np.int64))
        return {
            "rows": index.clone(),
            "keys": torch.from_numpy(keys.view(np.int64)),
            "last_ms": torch.from_numpy(last_ms),
            "weight": self.weight.index_select(0, index),
        }

    def put_rows(self, part: Mapping[str, Tensor]) -> None:
        """Make rows hold exactly what `rows` gave elsewhere; `DataError` if they cannot belong to this table."""
        rows, keys = part["rows"].numpy(), part["keys"].numpy().view(np.uint64)
        last_ms, weight = part["last_ms"].numpy(), part["weight"]
        if not (len(rows) == len(keys) == len(last_ms) == len(weight)) or weight.shape[1:] != (self.dim,):
            raise DataError("table columns of different shapes", where="table/*", remedy="wait for the next snapshot")
        if len(rows) and (rows.min() < 1 or rows.max() >= len(self.weight) or len(np.unique(rows)) != len(rows)):
            raise DataError(
                f"rows outside 1..{len(self.weight) - 1} or twice", where="table/rows", remedy="use the same [table]"
            )
        slots = rows - self.first_slot
        is_slot = slots >= 0
        slots, keys, last_ms = slots[is_slot], keys[is_slot], last_ms[is_slot]
        first, second = buckets(keys, self._buckets)
        home = slots // self._width
        if np.any((home != first) & (home != second) & (last_ms != EMPTY)):
            raise DataError("a key outside its buckets", where="table/keys", remedy="use the same [table]")
        self._keys[slots], self._last_ms[slots] = keys, last_ms
        self._score[slots] = self._time_score(last_ms)
        self.weight[part["rows"]] = weight.to(self.weight.dtype)
        self.touch(rows)

    def state(self) -> dict[str, Tensor]:
        """A copy of everything, for checkpoints."""
        scalars = [self._mark, self._watermark, self._admissions, self._evictions, self._expiries, self._unplaced]
        state = {
            "keys": torch.from_numpy(self._keys.view(np.int64).copy()),
            "last_ms": torch.from_numpy(self._last_ms.copy()),
            "score": torch.from_numpy(self._score.copy()),
            "changed": torch.from_numpy(self._changed.copy()),
            "weight": self.weight.clone(),
            "scalars": torch.tensor(scalars, dtype=torch.int64),
        }
        if self._sketch is not None:
            state["sketch"] = torch.from_numpy(self._sketch.cells.astype(np.int32))
            state["sketch_counted"] = torch.tensor([self._sketch.counted])
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Become exactly the table that `state` was taken from; `ConfigError` if the settings differ in shape."""
        mine = self.state()
        if wrong := [
            k for k in mine.keys() | state.keys() if k not in state or k not in mine or mine[k].shape != state[k].shape
        ]:
            raise ConfigError(
                f"the stored table has another geometry ({', '.join(sorted(wrong))})",
                where="[table]",
                remedy="start with the settings it was written with, or from the newest weights snapshot",
            )
        self._keys = state["keys"].numpy().view(np.uint64).copy()
        self._last_ms, self._score = state["last_ms"].numpy().copy(), state["score"].numpy().copy()
        self._changed = state["changed"].numpy().copy()
        self.weight.copy_(state["weight"])
        scalars = [int(x) for x in state["scalars"]]
        self._mark, self._watermark, self._admissions, self._evictions, self._expiries, self._unplaced = scalars
        if self._sketch is not None:
            self._sketch.cells = state["sketch"].numpy().astype(np.uint16)
            self._sketch.counted = int(state["sketch_counted"])

    def copy(self) -> "IdTable":
        """An independent table that holds the same."""
        twin = IdTable(self.settings, self.dim, 0)
        twin.load_state(self.state())
        return twin

    # -- slots

    def _horizon(self, watermark_ms: int) -> int:
        """The oldest `last_ms` that has not expired; above EMPTY, so that an empty slot never counts."""
        return max(watermark_ms - self._ttl_ms, EMPTY + 1)

    def _expire(self) -> None:
        gone = (self._last_ms < self._horizon(self._watermark)) & (self._last_ms != EMPTY)
        self._expiries += int(np.count_nonzero(gone))
        self._last_ms[gone] = EMPTY

    def _candidates(self, keys: U64) -> I64:
        """i64[n, 2W]: the slots of both buckets."""
        first, second = buckets(keys, self._buckets)
        column = np.arange(self._width)
        return np.concatenate([first[:, None] * self._width + column, second[:, None] * self._width + column], 1)

    def _find(self, keys: U64, horizon: int) -> I64:
        """i64[n]: the live slot of each key, -1 without one."""
        slots = np.full(len(keys), -1, np.int64)
        held_keys, last_ms = (x.reshape(self._buckets, self._width) for x in (self._keys, self._last_ms))
        for bucket in buckets(keys, self._buckets):
            match = (held_keys[bucket] == keys[:, None]) & (last_ms[bucket] >= horizon)
            hit, column = np.nonzero(match)
            slots[hit] = bucket[hit] * self._width + column
        return slots

    def _rows(self, keys: U64, slots: I64) -> tuple[I64, I64]:
        a, b = fallback_rows(keys, self.settings.fallback_rows)
        found = slots >= 0
        return np.where(found, slots + self.first_slot, a), np.where(found, slots + self.first_slot, b)

    def _place(self, keys: U64, held: NDArray[np.bool_]) -> I64:
        """Slots i64[n] for distinct ascending keys, -1 where everything is held; marks them held."""
        taken = np.full(len(keys), -1, np.int64)
        choices = self._candidates(keys)
        waiting = np.arange(len(keys))
        while len(waiting):
            slots = choices[waiting]
            cost = np.where(self._last_ms[slots] == EMPTY, EMPTY, self._score[slots])
            cost[held[slots]] = np.iinfo(np.int64).max
            best = cost.argmin(1)
            rows = np.arange(len(waiting))
            open_ = ~held[slots[rows, best]]
            waiting, wish = waiting[open_], slots[rows, best][open_]
            _, winners = np.unique(wish, return_index=True)  # the first, that is the smallest key, wins the slot
            taken[waiting[winners]] = wish[winners]
            held[wish[winners]] = True
            waiting = np.delete(waiting, winners)
        return taken

    def _settle(self, slots: I64, keys: U64, newest: I64, counts: I64) -> None:
        """Give slots to new keys, starting at their fallback vectors."""
        self._evictions += int(np.count_nonzero(self._last_ms[slots] != EMPTY))
        self._admissions += len(slots)
        self._keys[slots], self._last_ms[slots] = keys, EMPTY
        a, b = (torch.from_numpy(rows) for rows in fallback_rows(keys, self.settings.fallback_rows))
        rows = torch.from_numpy(slots + self.first_slot)
        self.weight[rows] = (self.weight[a] + self.weight[b]) / 2
        self._score[slots] = EMPTY // 2
        self._touch_slots(slots, newest, counts)

    def _touch_slots(self, slots: I64, newest: I64, counts: I64) -> None:
        self._last_ms[slots] = np.maximum(self._last_ms[slots], newest)
        seen = self._time_score(newest) + np.rint(np.log2(counts) * (1 << FRACTION)).astype(np.int64)
        old = self._score[slots]
        gap = np.minimum(np.abs(old - seen) >> SOFTPLUS_STEP, len(SOFTPLUS) - 1)
        self._score[slots] = np.maximum(old, seen) + SOFTPLUS[gap]
        self.touch(slots + self.first_slot)

    def _time_score(self, times: I64) -> I64:
        """The time in half lives, fixed point; the quotient and the remainder apart, so that neither overflows."""
        t, h = np.clip(times, 0, LATEST_MS), self._half_life_ms
        return ((t // h) << FRACTION) + ((t % h) << FRACTION) // h
