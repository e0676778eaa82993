"""Histories end to end, as rows: which request an impression belongs to, what is earlier, what joins what.

The rules are those of the sequences (decisions 1 and 9), said over columns: a batch costs a few sorts, not a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamgr.events import FIRST_ACTION, IMPRESSION, History

Number = TypeVar("Number", np.uint8, np.int64, np.uint64)
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Histories end to end: their columns, the sequence of each row, for each row the first of its request (`anchor`),
    where the rows that are earlier than that one's time end, and where the rows end that it sees."""

    offsets: Ints
    sequence: Ints
    kinds: NDArray[np.uint8]
    items: NDArray[np.uint64]
    times: Ints
    requests: NDArray[np.uint64]
    is_item: NDArray[np.bool_]
    anchor: Ints
    earlier: Ints
    first_unseen: Ints

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def of(cls, histories: Sequence[History]) -> "Rows":
        lengths = np.array([len(h) for h in histories], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        kinds = column([h.kinds for h in histories], np.uint8)
        times = column([h.times for h in histories], np.int64)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        index = np.arange(len(kinds))
        is_item = kinds == IMPRESSION
        requests = column([h.requests for h in histories], np.uint64)
        anchor = _request_start(sequence, is_item, requests)
        begins = np.ones(len(kinds), bool)  # where a run of equal times begins
        begins[1:] = (times[1:] != times[:-1]) | (sequence[1:] != sequence[:-1])
        run_start = np.maximum.accumulate(np.where(begins, index, 0))
        earlier = run_start[anchor]
        return cls(
            offsets,
            sequence,
            kinds,
            column([h.items for h in histories], np.uint64),
            times,
            requests,
            is_item,
            anchor,
            earlier,
            np.where(is_item, earlier, index),
        )

    def joined(self, window_ms: int) -> Ints:
        """For each action the impression that it joins, -1 without one and for every other row: the latest before it
        of its item, and of its request where it names one, less than `window_ms` ago. i64[n]
        """
        any_request = self._latest_shown(np.zeros(len(self), np.uint64), np.arange(len(self)))
        named = np.flatnonzero(self.requests != 0)
        found = np.where(self.requests != 0, -1, any_request)
        found[named] = self._latest_shown(self.requests[named], named)
        near = self.times - self.times[found] < window_ms
        return np.where((self.kinds >= FIRST_ACTION) & (found >= 0) & near, found, -1)

    def _latest_shown(self, requests: NDArray[np.uint64], rows: Ints) -> Ints:
        """For each of some rows, ascending, the latest impression among those of them that share sequence, item and
        request and are not after it; -1 without."""
        order = np.lexsort((rows, requests, self.items[rows], self.sequence[rows]))
        keys = (self.sequence[rows][order], self.items[rows][order], requests[order])
        begins = np.ones(len(order), bool)
        begins[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
        start = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
        shown = np.maximum.accumulate(np.where(self.is_item[rows][order], np.arange(len(order)), -1))
        latest = np.full(len(rows), -1)
        latest[order] = np.where(shown >= start, rows[order][np.maximum(shown, 0)], -1)
        return latest


def _request_start(sequence: Ints, is_item: NDArray[np.bool_], requests: NDArray[np.uint64]) -> Ints:
    """Index of the first impression of each impression's request; every other row's own index."""
    anchor = np.arange(len(requests))
    shown = np.flatnonzero(is_item & (requests != 0))
    if len(shown):
        order = shown[np.lexsort((requests[shown], sequence[shown]))]  # stable: the earliest of a request leads it
        leads = np.ones(len(order), bool)
        leads[1:] = (requests[order][1:] != requests[order][:-1]) | (sequence[order][1:] != sequence[order][:-1])
        anchor[order] = order[np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0))]
    return anchor


def column(parts: Sequence[NDArray[Any]], dtype: type[Number]) -> NDArray[Number]:
    """Columns end to end, of one type."""
    return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])
