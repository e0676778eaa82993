"""The vocabularies that are compared at equal memory, each in the place of a Learner's table.

Everybody has the same number of rows, the same network, optimizers and batches. Rivals never let go of an id, so they
are told for nothing what ours knows by itself: which ids are of interest still (`Recent`: seen within the same time to
live), from which they draw negatives and which they rank.

    id % size     one row an id
    two-hash      the mean of two rows, from halves of their own
    static        ids get rows first come, first served; once there are none left, newcomers share one
"""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding, normalize

from streamgr import config
from streamgr.model.hashing import I64, U64, fallback_rows
from streamgr.model.table import INIT_STD, ITEM, WIRE, IdTable, Lookup, mean, served
from streamgr.train.batch import Batch
from streamgr.train.learner import Learner, Negatives, Predictions
from streamgr.train.optim import row_optimizer

NOBODY = np.zeros(0, np.int64)
NEVER = float(1 << 40)  # seconds
ROOM = 1 << 15  # slots: more than any stream has ids


class Recent:
    """Which ids have been seen within a time: what a site's catalogue would tell."""

    def __init__(self, vocabulary: U64, keep_ms: int) -> None:
        self.vocabulary, self._keep_ms = vocabulary, keep_ms
        self._last = np.full(len(vocabulary), np.iinfo(np.int64).min // 2)

    def places(self, keys: U64) -> I64:
        return np.searchsorted(self.vocabulary, keys)

    def touch(self, keys: U64, times: I64) -> None:
        np.maximum.at(self._last, self.places(keys), times)

    def live(self, watermark_ms: int) -> U64:
        return self.vocabulary[self._last + self._keep_ms >= watermark_ms]


class Rival:
    """What a Learner asks of its table, without slots. `rows(keys)` -> two rows of each, which may be the same."""

    shared = 0  # leading rows that stand for many ids by design, and learn as slowly as our fallback rows

    def __init__(self, count: int, dim: int, seed: int, recent: Recent) -> None:
        self.count, self.recent = count, recent
        self.weight = torch.zeros(1 + count, dim)
        self.weight[1:].normal_(0, INIT_STD, generator=torch.Generator().manual_seed(seed))

    def rows(self, keys: U64) -> tuple[I64, I64]:
        raise NotImplementedError

    def has_own(self, keys: U64, watermark_ms: int) -> NDArray[np.bool_]:
        """bool[n]: whether an id of interest has a row that no other of them shares."""
        of_interest = self.recent.live(watermark_ms)
        a, b = self.rows(of_interest)
        sharers = np.bincount(np.concatenate([a, b[b != a]]), minlength=len(self.weight))
        a, b = self.rows(keys)
        return np.isin(keys, of_interest) & ((sharers[a] == 1) | (sharers[b] == 1))

    def map(self, keys: U64, times: I64, fields: Any = ITEM, *, watermark_ms: int) -> Lookup:
        return self.lookup(keys, watermark_ms=watermark_ms)

    def lookup(self, keys: U64, *, watermark_ms: int) -> Lookup:
        return Lookup(*self.rows(keys), NOBODY)

    def vectors(self, lookup: Lookup) -> Tensor:
        a, b = torch.from_numpy(lookup.rows_a), torch.from_numpy(lookup.rows_b)
        return mean(served(self.weight.index_select(0, a)), served(self.weight.index_select(0, b)))

    def live(self, watermark_ms: int, field: int = ITEM) -> tuple[I64, U64]:
        keys = self.recent.live(watermark_ms)
        return self.rows(keys)[0], keys

    def draw(self, count: int, field: int, watermark_ms: int, rng: np.random.Generator) -> tuple[I64, U64]:
        rows, keys = self.live(watermark_ms)
        if not len(keys):
            return rows, keys
        drawn = rng.integers(0, len(keys), count)
        return rows[drawn], keys[drawn]

    def touch(self, rows: I64) -> None:
        pass

    def crowded(self) -> bool:
        return False


class Modulo(Rival):
    def rows(self, keys: U64) -> tuple[I64, I64]:
        row = 1 + (keys % np.uint64(self.count)).astype(np.int64)
        return row, row


class TwoHash(Rival):
    def rows(self, keys: U64) -> tuple[I64, I64]:
        return fallback_rows(keys, self.count)


class Static(Rival):
    shared = 1

    def __init__(self, count: int, dim: int, seed: int, recent: Recent) -> None:
        super().__init__(count, dim, seed, recent)
        self._row = np.ones(len(recent.vocabulary), np.int64)
        self._next = 2

    def map(self, keys: U64, times: I64, fields: Any = ITEM, *, watermark_ms: int) -> Lookup:
        places, first = np.unique(self.recent.places(keys), return_index=True)
        without = places[np.argsort(first)]
        without = without[self._row[without] == 1][: self.count + 1 - self._next]
        self._row[without] = self._next + np.arange(len(without))
        self._next += len(without)
        return super().map(keys, times, watermark_ms=watermark_ms)

    def rows(self, keys: U64) -> tuple[I64, I64]:
        row = self._row[self.recent.places(keys)]
        return row, row

    def has_own(self, keys: U64, watermark_ms: int) -> NDArray[np.bool_]:
        return self.rows(keys)[0] > 1


class ColdTable(IdTable):
    """Ours, but a new slot starts at random instead of at its id's fallback vector."""

    def map(self, keys: U64, times: I64, fields: Any = ITEM, *, watermark_ms: int) -> Lookup:
        lookup = super().map(keys, times, fields, watermark_ms=watermark_ms)
        noise = np.random.default_rng(self.index.batch).normal(0, INIT_STD, (len(lookup.fresh), self.dim))
        self.weight[torch.from_numpy(lookup.fresh)] = torch.from_numpy(noise.astype(np.float32))
        return lookup


Changes = dict[str, dict[str, Any]]  # section -> key -> value
Entry = tuple[type, Callable[[float], Changes]]


class Contestant(Learner):
    """A Learner with somebody's table; judged also among everything of interest, the same for all (`common`)."""

    def __init__(self, settings: config.Config, make: type, recent: Recent) -> None:
        super().__init__(settings)
        table, dim, seed = settings.table, settings.model.dim, settings.trainer.seed
        self.recent, self.common = recent, NOBODY
        if issubclass(make, Rival):
            self.table = make(table.slots + table.fallback_rows, dim, seed, recent)
            self.sparse = row_optimizer(settings.trainer, len(self.table.weight), self.table.shared, dim)
        elif make is not IdTable:
            self.table = make(table, dim, seed)

    @property
    def is_rival(self) -> bool:
        return isinstance(self.table, Rival)

    def learn(self, batch: Batch) -> tuple[Predictions, str]:
        learned = super().learn(batch)
        self.recent.touch(batch.tokens.keys, batch.tokens.times)
        return learned

    def has_own(self, keys: U64) -> NDArray[np.bool_]:
        """bool[n]: whether an id has a row to itself, as things stand before its batch."""
        if self.is_rival:
            return self.table.has_own(keys, self.watermark_ms)
        return self.table.index.find(keys, self.watermark_ms) >= 0

    def _gather(self, lookup: Lookup, negatives: Negatives) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The Learner's, but a negative may be made of two rows; of a slot it is the same to the bit."""
        other = self.table.lookup(negatives.keys, watermark_ms=self.watermark_ms)
        parts = [lookup.rows_a, lookup.rows_b, other.rows_a, other.rows_b]
        used, place = np.unique(np.concatenate(parts), return_inverse=True)
        rows = torch.from_numpy(used)
        leaf = self.table.weight.index_select(0, rows).to(WIRE).float().requires_grad_()
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        a, b, c, d = (embedding(torch.from_numpy(part), leaf) for part in np.split(place, cuts))
        return rows, leaf, mean(a, b), mean(c, d)

    def _catalogue(self) -> tuple[U64, Tensor]:
        keys = self.recent.live(self.watermark_ms)
        vectors = self.table.vectors(self.table.lookup(keys, watermark_ms=self.watermark_ms))
        self._everything = keys, normalize(vectors, dim=1, eps=1e-6)
        return self._everything if self.is_rival else super()._catalogue()

    def _predictions(self, batch: Batch, logits: Any, queries: Any, catalogue: Any) -> Predictions:
        own = super()._predictions(batch, logits, queries, catalogue)
        self.common = own.rank
        if catalogue is not None and not self.is_rival:
            self.common = super()._predictions(batch, None, queries, self._everything).rank
        return own


def entrant(name: str, settings: config.Config, recent: Recent) -> Contestant:
    """A contestant by name; `settings.table` says what everybody has."""
    make, changes = ENTRANTS[name]
    for section, values in changes(settings.table.ttl_seconds).items():
        changed = msgspec.structs.replace(getattr(settings, section), **values)
        settings = msgspec.structs.replace(settings, **{section: changed})
    return Contestant(settings, make, recent)


def _as_it_is(ttl: float) -> Changes:
    return {}


def _table(**values: Any) -> Callable[[float], Changes]:
    """Values, or functions of the time to live."""
    return lambda ttl: {"table": {key: value(ttl) if callable(value) else value for key, value in values.items()}}


def _roomy(**model: Any) -> Callable[[float], Changes]:
    """A row for every id, and none of them taken away before its time."""
    return lambda ttl: {"table": {"slots": ROOM}, "model": model}


EQUAL_MEMORY: dict[str, Entry] = {
    "id % size": (Modulo, _as_it_is),
    "two-hash": (TwoHash, _as_it_is),
    "static + oov": (Static, _as_it_is),
    "streamgr": (IdTable, _as_it_is),
    "no ttl": (IdTable, _table(ttl_seconds=NEVER, half_life_seconds=lambda ttl: ttl / 4)),
    "admit 2": (IdTable, _table(admit_min=2)),
    "no warm start": (ColdTable, _as_it_is),
    "a row for all": (IdTable, _roomy()),  # not equal memory: what there is to be won
}
DEFAULTS: dict[str, Entry] = {
    "half life ttl/64": (IdTable, _table(half_life_seconds=lambda ttl: ttl / 64)),
    "half life 4 ttl": (IdTable, _table(half_life_seconds=lambda ttl: 4 * ttl)),
    "ttl/4": (IdTable, _table(ttl_seconds=lambda ttl: ttl / 4)),
    "ttl*4": (IdTable, _table(ttl_seconds=lambda ttl: ttl * 4)),
    "admit 4": (IdTable, _table(admit_min=4)),
    "adam": (IdTable, lambda ttl: {"trainer": {"table_optimizer": "adam", "table_learning_rate": 0.01}}),
}
NEGATIVES: dict[str, Entry] = {
    f"{drawn} + {own} negatives": (IdTable, _roomy(negatives=drawn, batch_negatives=own))
    for drawn, own in ((128, 0), (128, 64), (128, 128), (64, 64), (192, 0), (256, 0), (512, 0), (1024, 0))
}
ENTRANTS = EQUAL_MEMORY | DEFAULTS | NEGATIVES
