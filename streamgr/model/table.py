"""The ID table: 64-bit ids to embedding rows, without collisions, with expiry.

Rows: 0 is zeros; 1..F are shared fallback rows; slot s is row 1+F+s. Which key holds which slot is the index's matter
(`index`); here are the vectors.

A key without a slot (not admitted yet, unplaced, evicted, expired, never seen) is the mean of two fallback rows, which
are trained like any other; on admission a slot starts as exactly that mean. So admitting a key changes no prediction,
and a scorer that has not heard of it yet answers the same.

What is served is bfloat16, what is learned float32: every vector that the trainer predicts with is rounded as it goes
over the wire (`served`), so both sides compute with the same bytes and a version's digest covers what was judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.errors import ConfigError, DataError
from streamgr.model.admission import Sketch
from streamgr.model.hashing import I64, U64, fallback_rows
from streamgr.model.index import EMPTY, Index

ITEM, USER, FEATURE = 0, 1, 2  # fields: kinds of ids, each with a life of its own
WIRE = torch.bfloat16
INIT_STD = 0.02
BLOCK = 1 << 12  # rows moved together: in between they stay in the cache
CROWDED = 0.75  # of the slots: from here on both buckets of a key may be full, and what has not expired is evicted


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows of n keys: rows_a i64[n], rows_b i64[n] (equal for a slot, two fallback rows otherwise).

    fresh i64[k], ascending: rows given to another key by this `map`; their optimizer state must start anew.
    """

    rows_a: I64
    rows_b: I64
    fresh: I64


@dataclass(frozen=True, slots=True)
class TableStats:
    """used = admissions - evictions - expiries. The last three count keys that a batch brought and no slot took:
    not come often enough, both buckets pinned by their own batch, older than a life.
    """

    slots: int
    used: int
    admissions: int
    evictions: int
    expiries: int
    unadmitted: int
    unplaced: int
    stale: int


class IdTable:
    """The table and its weights; one owner, not thread safe. `weight` is f32[1 + F + slots, dim]."""

    def __init__(self, settings: config.Table, dim: int, seed: int, *, pin_depth: int = 0) -> None:
        self.settings, self.dim = settings, dim
        self.first_slot = 1 + settings.fallback_rows
        life = milliseconds(settings.ttl_seconds)
        lives = [
            life,
            milliseconds(settings.user_ttl_seconds) or life,
            milliseconds(settings.feature_ttl_seconds) or life,
        ]
        self.index = Index(
            settings.slots,
            settings.bucket_width,
            lives_ms=lives,
            half_life_ms=min(max(milliseconds(settings.half_life_seconds) or life // 4, 1000), 1 << 42),
            sketch=Sketch(settings.slots) if settings.admit_min > 1 else None,
            admit_min=settings.admit_min,
            pin_depth=pin_depth,
        )
        self._changed: I64 = np.full(self.first_slot + len(self.index), -1, np.int64)
        self._mark = 0
        self.weight = torch.zeros(self.first_slot + len(self.index), dim)
        generator = torch.Generator().manual_seed(seed)
        self.weight[1 : self.first_slot].normal_(0, INIT_STD, generator=generator)

    # --- keys to rows

    def map(self, keys: U64, times: I64, fields: NDArray[np.uint8] | int = ITEM, *, watermark_ms: int) -> Lookup:
        """Rows for training: admit, touch and evict. keys u64[n], times i64[n] (event ms), any order, repeats allowed.

        The watermark never moves back: a lower one counts as the highest so far.
        """
        mapped = self.index.map(keys, times, fields, watermark_ms=watermark_ms)
        fresh = mapped.fresh + self.first_slot
        a, b = (torch.from_numpy(rows) for rows in fallback_rows(mapped.fresh_keys, self.settings.fallback_rows))
        self.weight[torch.from_numpy(fresh)] = (served(self.weight[a]) + served(self.weight[b])) / 2
        rows_a, rows_b = self._rows(keys, mapped.slots)
        self.touch(rows_a[mapped.slots >= 0])
        return Lookup(rows_a, rows_b, fresh)

    def lookup(self, keys: U64, *, watermark_ms: int) -> Lookup:
        """Rows for reading, u64[n] -> rows; changes nothing."""
        a, b = self._rows(keys, self.index.find(keys, watermark_ms))
        return Lookup(a, b, np.zeros(0, np.int64))

    def vectors(self, lookup: Lookup) -> Tensor:
        """What is served, f32[n, dim]: the row of a slot, else the mean of two; all of it rounded to the wire's."""
        a, b = torch.from_numpy(lookup.rows_a), torch.from_numpy(lookup.rows_b)
        return mean(served(self.weight.index_select(0, a)), served(self.weight.index_select(0, b)))

    def live(self, watermark_ms: int, field: int | None = None) -> tuple[I64, U64]:
        """The rows i64[k] (ascending) and keys u64[k] that hold something (of a field) at this watermark."""
        slots = self.index.live(watermark_ms, field)
        return slots + self.first_slot, self.index.keys[slots]

    def live_count(self, watermark_ms: int, field: int) -> int:
        """How many keys of a field are live."""
        return len(self.index.live(watermark_ms, field))

    def draw(self, count: int, field: int, watermark_ms: int, rng: np.random.Generator) -> tuple[I64, U64]:
        """Rows i64[count] and keys u64[count] of live keys of a field, uniformly with repetition; none without any."""
        slots = self.index.draw(count, field, watermark_ms, rng)
        return slots + self.first_slot, self.index.keys[slots]

    def share(self, rows: I64) -> NDArray[np.float64]:
        """f64[n]: the chance that a token of the recent past (by the half life) is this row's key; 0: fallback rows."""
        slots = np.maximum(rows - self.first_slot, 0)
        return np.where(rows >= self.first_slot, self.index.share(slots), 0.0)

    def stats(self) -> TableStats:
        """As of the highest watermark that a map has seen."""
        t, used = self.index.tally, len(self.index.live(self.index.watermark))
        expiries = t.admissions - t.evictions - used
        return TableStats(len(self.index), used, t.admissions, t.evictions, expiries, t.unadmitted, t.unplaced, t.stale)

    # --- what has changed, and moving it

    def mark(self) -> int:
        """Begin a new interval; `changed_since` of the value returned gives what changes from now on."""
        self._mark += 1
        return self._mark

    def touch(self, rows: I64) -> None:
        """Note that `rows` have changed."""
        self._changed[rows] = self._mark

    def changed_since(self, mark: int) -> I64:
        """Rows i64[k], ascending, whose weights, key or life changed at or after `mark`."""
        return np.flatnonzero(self._changed >= mark)

    def snapshot_rows(self, watermark_ms: int) -> I64:
        """Rows i64[k], ascending, that a snapshot must hold: the fallback rows and every live slot."""
        return np.concatenate([np.arange(1, self.first_slot), self.live(watermark_ms)[0]])

    def rows(self, rows: I64) -> dict[str, Tensor]:
        """A copy of rows as they go over the wire: "rows" i64[k], "keys" i64[k] (u64 bits), "until_ms" i64[k],
        "field" u8[k], "weight" bf16[k, dim]. Fallback rows have key 0 and the `until_ms` of an empty slot.
        """
        slots = rows - self.first_slot
        shared = slots < 0
        slots = np.maximum(slots, 0)
        keys, until, field = self.index.keys[slots], self.index.until_ms[slots], self.index.field[slots]
        keys[shared], until[shared], field[shared] = 0, EMPTY, 0
        index = torch.from_numpy(rows.astype(np.int64))
        weight = torch.empty((len(rows), self.dim), dtype=WIRE)
        for at in range(0, len(rows), BLOCK):
            weight[at : at + BLOCK] = self.weight.index_select(0, index[at : at + BLOCK])
        return {
            "rows": index.clone(),
            "keys": torch.from_numpy(keys.view(np.int64)),
            "until_ms": torch.from_numpy(until),
            "field": torch.from_numpy(field),
            "weight": weight,
        }

    def put_rows(self, part: Mapping[str, Tensor]) -> None:
        """Make rows hold exactly what `rows` gave elsewhere; `DataError` if they cannot belong to this table."""
        rows, keys = part["rows"].numpy(), part["keys"].numpy().view(np.uint64)
        until, field, weight = part["until_ms"].numpy(), part["field"].numpy(), part["weight"]
        if not (len(rows) == len(keys) == len(until) == len(field) == len(weight)) or weight.shape[1:] != (self.dim,):
            raise DataError("table columns of different shapes", where="table/*", remedy="wait for the next snapshot")
        if len(rows) and (rows.min() < 1 or rows.max() >= len(self.weight) or not np.diff(np.sort(rows)).all()):
            raise DataError(
                f"rows outside 1..{len(self.weight) - 1} or twice", where="table/rows", remedy="use the same [table]"
            )
        if np.any(field > FEATURE):
            raise DataError(f"a field beyond {FEATURE}", where="table/field", remedy="use the same version of streamgr")
        own = np.flatnonzero(rows >= self.first_slot)
        slots, keys, until = rows[own] - self.first_slot, keys[own], until[own]
        first, second = self.index.homes(keys)
        home = slots // self.index.width
        if np.any((home != first) & (home != second) & (until != EMPTY)):
            raise DataError("a key outside its buckets", where="table/keys", remedy="use the same [table]")
        self.index.put(slots, keys, until, field[own])
        for at in range(0, len(rows), BLOCK):
            self.weight.index_copy_(0, part["rows"][at : at + BLOCK], weight[at : at + BLOCK].to(self.weight.dtype))
        self.touch(rows)

    # --- growing, and checkpoints

    @property
    def geometry(self) -> config.Table:
        """The settings of a table that begins as large as this one has grown."""
        return msgspec.structs.replace(self.settings, slots=len(self.index))

    def crowded(self) -> bool:
        """Whether the table should grow, and may."""
        slots = len(self.index)
        if 2 * slots > self.settings.max_slots:
            return False
        return len(self.index.live(self.index.watermark)) > CROWDED * slots

    def grow(self) -> tuple[Tensor, Tensor]:
        """Twice the slots; which rows i64[k] have gone where, i64[k]. Every row but that of zeros counts as changed."""
        old, weight = self.first_slot + np.arange(len(self.index)), self.weight
        new = self.first_slot + self.index.grow()
        self.weight = torch.zeros(self.first_slot + len(self.index), self.dim)
        self.weight[: self.first_slot] = weight[: self.first_slot]
        before, after = torch.from_numpy(old), torch.from_numpy(new)
        self.weight[after] = weight[before]
        self._changed = np.full(len(self.weight), self._mark, np.int64)
        self._changed[0] = -1  # the row of zeros never does
        return before, after

    def state(self) -> dict[str, Tensor]:
        """A copy of everything, for checkpoints."""
        state = {name: torch.from_numpy(_signed(column)) for name, column in self.index.state().items()}
        state["changed"], state["mark"] = torch.from_numpy(self._changed.copy()), torch.tensor([self._mark])
        state["weight"] = self.weight.clone()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Become exactly the table that `state` was taken from; `ConfigError` if the settings differ in shape."""
        slots, width = len(state["keys"]), self.index.width
        mine = {name: column.shape[1:] for name, column in self.state().items()}
        fits = mine == {name: column.shape[1:] for name, column in state.items()}
        fits = fits and state["weight"].shape == (self.first_slot + slots, self.dim)
        grown = slots // self.settings.slots
        if not fits or slots % self.settings.slots or grown & (grown - 1) or slots % width:
            raise ConfigError(
                f"the stored table has another geometry: {slots} slots, weights {list(state['weight'].shape)}",
                where="[table]",
                remedy="start with the settings it was written with, or from the newest weights snapshot",
            )
        names = state.keys() - {"changed", "mark", "weight"}
        self.index.load_state({name: state[name].numpy() for name in names})
        self._changed, self._mark = state["changed"].numpy().copy(), int(state["mark"])
        self.weight = state["weight"].clone()

    # ---

    def _rows(self, keys: U64, slots: I64) -> tuple[I64, I64]:
        rows_a = slots + self.first_slot
        rows_b = rows_a.copy()
        without = np.flatnonzero(slots < 0)
        if len(without):
            rows_a[without], rows_b[without] = fallback_rows(keys[without], self.settings.fallback_rows)
        return rows_a, rows_b


def served(weight: Tensor) -> Tensor:
    """The weights as the wire has them, f32[...]; the gradient passes straight through."""
    return weight + (weight.to(WIRE).to(weight.dtype) - weight).detach()  # exact: the difference is representable


def mean(a: Tensor, b: Tensor) -> Tensor:
    """The vector of a key from its two rows, f32[n, dim]: of a slot the row itself, else what a slot would start at."""
    return served((a + b) / 2)


def _signed(column: NDArray[Any]) -> NDArray[Any]:
    """torch has few unsigned types: the same bits as i64, or what fits."""
    if column.dtype == np.uint64:
        return column.view(np.int64)
    return column.astype(np.int32) if column.dtype == np.uint16 else column
