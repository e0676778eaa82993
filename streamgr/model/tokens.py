"""Tokens: histories as one jagged batch, with what each token may see and the time it asks at.

Every event is one token. An *item token* (impression) belongs to a request; its request time r is the earliest time of
the impressions of that request in the window (its own time without one). It sees the tokens before r and itself: never
the other items of its request, nor what came of them (decision 1). An *action token* sees everything before it in
sequence order, and itself. `visible[i]` = how many leading tokens of its sequence token i sees besides itself, so the
attention mask is `j < visible[i] or j == i` and a candidate at serving is an item token with `visible = n`.

The query time of an item token is r; of an action token the time of the token after it (the "next timestamp" rule:
it is asked what comes next at the moment when that came), of a last one its own time, or the request's `at` at serving.
Because a sequence is in time order, the first token that a target does not see stands at exactly its r: what the
trainer sees through the last visible action is what the scorer saw with `at = r`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamgr.events import IMPRESSION, History

Number = TypeVar("Number", np.int64, np.uint64)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A jagged batch of B sequences and T tokens.

    offsets i64[B+1]; kinds i64[T] (IMPRESSION or action); items u64[T]; times i64[T] and query_times i64[T] (ms);
    visible i64[T] (counted from the start of the token's own sequence).
    """

    offsets: NDArray[np.int64]
    kinds: NDArray[np.int64]
    items: NDArray[np.uint64]
    times: NDArray[np.int64]
    query_times: NDArray[np.int64]
    visible: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kinds)


def tokenize(histories: Sequence[History], at: Sequence[int] | None = None) -> Tokens:
    """Lay histories end to end. `at` (ms, one a history): the time asked at each end; None: the training rule."""
    lengths = np.array([len(h) for h in histories], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    kinds = _column([h.kinds for h in histories], np.int64)
    times = _column([h.times for h in histories], np.int64)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    index = np.arange(len(kinds))
    is_item = kinds == IMPRESSION
    anchor = _request_start(sequence, is_item, _column([h.requests for h in histories], np.uint64))

    begins = np.ones(len(kinds), bool)  # where a run of equal times begins
    begins[1:] = (times[1:] != times[:-1]) | (sequence[1:] != sequence[:-1])
    run_start = np.maximum.accumulate(np.where(begins, index, 0))
    first_unseen = np.where(is_item, run_start[anchor], index)

    query_times = np.append(times[1:], 0)
    last = offsets[1:][lengths > 0] - 1
    query_times[last] = times[last] if at is None else np.asarray(at, np.int64)[lengths > 0]
    return Tokens(
        offsets,
        kinds,
        _column([h.items for h in histories], np.uint64),
        times,
        np.where(is_item, times[anchor], query_times),
        first_unseen - offsets[sequence],
    )


def request_times(history: History) -> NDArray[np.int64]:
    """i64[n], ms: the request time of each impression, the own time of each action."""
    is_item = history.kinds == IMPRESSION
    anchor = _request_start(np.zeros(len(history), np.int64), is_item, history.requests)
    return history.times.astype(np.int64)[anchor]


def visible(history: History) -> NDArray[np.int64]:
    """i64[n]: how many leading tokens each token sees besides itself."""
    return tokenize([history]).visible


def _request_start(
    sequence: NDArray[np.int64], is_item: NDArray[np.bool_], requests: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Index of the first impression of each impression's request; every other token's own index."""
    anchor = np.arange(len(requests))
    shown = np.flatnonzero(is_item & (requests != 0))
    if len(shown):
        order = shown[np.lexsort((requests[shown], sequence[shown]))]  # stable: the earliest of a request leads it
        leads = np.ones(len(order), bool)
        leads[1:] = (requests[order][1:] != requests[order][:-1]) | (sequence[order][1:] != sequence[order][:-1])
        anchor[order] = order[np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0))]
    return anchor


def _column(parts: Sequence[NDArray[Any]], dtype: type[Number]) -> NDArray[Number]:
    return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])
